"""Small models of Hugging Face's kind for tests: tokenizers and folders."""

import io
import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

TEXTS = ("Once upon a time there was a small model.", "It learned to write: é, ☃ and 1,234 words!", "  spaces\n\n too ")


def byte_level(size: int = 300) -> tokenizers.Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it, with `size` ids."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        TEXTS, vocab_size=size - 2, min_frequency=1, special_tokens=["<|end|>", "<|pad|>"], show_progress=False
    )
    filler = [f"<filler_{i}>" for i in range(size - tokenizer.get_vocab_size())]
    tokenizer.add_tokens(filler)
    return tokenizers.Tokenizer.from_str(tokenizer.to_str())


def sentencepiece_like(size: int = 300) -> tokenizers.Tokenizer:
    """BPE with "▁" for spaces and bytes to fall back to, as Llama 2 has it."""
    specials = ["<unk>", "<s>", "</s>"]
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghinoprst", "▁a", "th", "▁th"]
    vocabulary = {name: i for i, name in enumerate(names)}
    model = models.BPE(
        vocabulary, [("▁", "a"), ("t", "h"), ("▁", "th")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens([f"<filler_{i}>" for i in range(size - len(names))])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """BPE whose pre-tokenizer puts the space in front."""
    tokenizer = sentencepiece_like()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def save_tokenizer(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, **special_tokens: str | dict) -> str:
    """Writes a tokenizer.json with a tokenizer_config.json beside it, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special_tokens))
    return str(folder / "tokenizer.json")


def save_sentencepiece(path: pathlib.Path, **settings: Any) -> str:
    """Writes a small SentencePiece model, and returns its path."""
    text = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="bpe", minloglevel=2, pad_id=0, eos_id=1, unk_id=2,
        **({"vocab_size": 330, "byte_fallback": True, "hard_vocab_limit": False, "bos_id": -1} | settings),
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return str(path)


def save_shards(folder: pathlib.Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Writes tensors as safetensors, with an index if there are several files."""
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number::shards]
        safetensors.numpy.save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_qwen2(folder: pathlib.Path) -> None:
    """A random Qwen2 of one layer, for a tokenizer of at most 320 ids."""
    width, inner, heads, head_dim, ids = 16, 24, 2, 8, 320
    block = {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    block |= {"self_attn.q_proj": (width, width), "self_attn.o_proj": (width, width)}
    block |= {f"self_attn.{name}_proj": (head_dim, width) for name in "kv"}
    shapes = {f"{name}.weight": shape for name, shape in block.items()}
    shapes |= {f"self_attn.{name}_proj.bias": shapes[f"self_attn.{name}_proj.weight"][:1] for name in "qkv"}
    shapes |= {f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes = {f"model.layers.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens.weight": (ids, width), "model.norm.weight": (width,)}
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    save_shards(folder, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
    config = {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 256,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "vocab_size": ids,
    }
    (folder / "config.json").write_text(json.dumps(config))


def read_shards(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def edit_config(folder: pathlib.Path, **changes: Any) -> None:
    """Changes keys of a config.json; None takes one away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
