"""Writes an untrained Qwen3 of half a million parameters in Hugging Face format, with a tokenizer made of your text.

    python launch/tiny_qwen3.py TEXT_FILE... --output DIR [--experts]

docs/walkthrough.md starts from it: a model that `transformers` and `diffusion_t5x.convert from_hf` read. With
--experts, it is a mixture of experts of two million parameters: docs/moe.md starts from that.
"""

import argparse
import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers

from diffusion_t5x.command_line.config import program
from diffusion_t5x.command_line.flags import Parser
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import families, output
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.models.transformer import ModelDefinition

END = "<|endoftext|>"
CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
# Each token is read by 2 of 8 experts.
EXPERTS = CONFIG | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 128,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_DEVIATION = 0.02  # of the matrices' random values


def write(files: list[str], output_folder: str, experts: bool) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    Args:
      files: UTF-8 texts, from which the tokenizer is made.
      output_folder: a folder that is empty or does not exist.
      experts: a mixture of experts.

    Raises:
      UserError: there is no such text, or the output folder is not empty.
    """
    to = output.empty_folder(output_folder)
    for file in files:
        if not pathlib.Path(file).is_file():
            raise UserError(f"There is no file {file}.")
    config = EXPERTS if experts else CONFIG
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    # A reserve of ids: MASK will be the first.
    rows = config["vocab_size"]
    tokenizer.train(files, vocab_size=rows - 24, special_tokens=[END], show_progress=False)

    family = families.FAMILIES[config["model_type"]]
    tied = config["tie_word_embeddings"]
    model = family.config(Keys(config, "config.json", family.aliases), tied)
    ids = TokenIds(size=rows, pad_id=0, eos_id=0, mask_id=rows - 1, start_id=0, noise_ranges=((1, rows - 1),))
    shapes = families.param_shapes(ModelDefinition(model, ids))
    rng, tensors = np.random.default_rng(0), {}
    for weight in family.weights(model):
        shape = weight.their_shape(shapes[weight.ours][weight.stacked_axes :])
        for name in weight.names(model.num_layers):
            is_norm = len(shape) == 1
            tensors[name] = (
                np.ones(shape, np.float32) if is_norm else _DEVIATION * rng.standard_normal(shape, np.float32)
            )

    to.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(to / "tokenizer.json"))
    said = {"eos_token": END, "pad_token": END, "tokenizer_class": "Qwen2TokenizerFast"}
    (to / "tokenizer_config.json").write_text(json.dumps(said, indent=1))
    (to / "config.json").write_text(json.dumps(config, indent=1))
    safetensors.numpy.save_file(tensors, to / "model.safetensors", {"format": "pt"})
    print(f"Wrote {to}: {sum(x.size for x in tensors.values()):,} parameters, {tokenizer.get_vocab_size()} pieces")


if __name__ == "__main__":
    with program():
        parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("files", nargs="+", metavar="TEXT_FILE")
        parser.add_argument("--output", required=True, dest="output_folder", metavar="DIR")
        parser.add_argument("--experts", action="store_true")
        write(**vars(parser.parse_args()))
