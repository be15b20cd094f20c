"""Models that are quantized while they are imported: what is stored, and what readers get of it."""

import functools
import json

import jax
import numpy as np
import open_models
import pytest

from diffusion_t5x.checkpointing import restoring, stored
from diffusion_t5x.checkpointing.assignment import named_leaves
from diffusion_t5x.checkpointing.checkpoints import find_checkpoint
from diffusion_t5x.convert import convert
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.importing import families
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.models.frozen import freeze
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.training.lora import Lora, LoraDefinition

CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 384,
    "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "attention_bias": False, "tie_word_embeddings": True, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
FAMILY = families.FAMILIES["qwen3_moe"]
IDS = TokenIds(size=384, pad_id=0, eos_id=0, mask_id=383, start_id=0, noise_ranges=((1, 383),))
PLAIN = ModelDefinition(FAMILY.config(Keys(CONFIG, "config.json", FAMILY.aliases), True), IDS)
MATRICES = {f"attention/{name}" for name in ("query", "key", "value", "out")} | {"mlp/wi_0", "mlp/wi_1", "mlp/wo"}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Imports a random Qwen3 of experts with its matrices in a dtype; returns the folder."""
    source, to = (tmp_path_factory.mktemp(name) for name in ("source", "imported"))
    shapes, rng, tensors = families.param_shapes(PLAIN), np.random.default_rng(0), {}
    for weight in FAMILY.weights(PLAIN.config):
        shape = weight.their_shape(shapes[weight.ours][weight.stacked_axes :])
        tensors |= {name: rng.standard_normal(shape, np.float32) for name in weight.names(2)}
    open_models.save_shards(source, tensors)
    (source / "config.json").write_text(json.dumps(CONFIG))
    open_models.save_tokenizer(source, open_models.byte_level(), eos_token="<|end|>")

    @functools.cache
    def folder_of(dtype):
        flags = [] if dtype == "float32" else ["--frozen_dtype", dtype]
        convert(["from_hf", str(source), *flags, "--output", str(to / dtype)])
        return str(to / dtype)

    return folder_of


def plain(folder):
    """The parameters, as readers get them."""
    shapes, read = restoring.open_params(folder)
    return {name: read(name) for name in shapes}


def codes_of(folder):
    """The stored codes by the matrix's name."""
    path = find_checkpoint(folder)
    leaves = {name: leaf for name, leaf in stored.leaves(path).items() if name.endswith("/codes")}
    targets = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    arrays = stored.read_arrays(path, targets, {name: name for name in targets})
    return {name.removeprefix("params/decoder/blocks/").removesuffix("/codes"): x for name, x in arrays.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_matrices_of_layers_are_stored_as_codes(imported, dtype):
    """Readers get what quantizing the plain import gives, and all else bit for bit."""
    axes = named_leaves(PLAIN.axes(), lambda leaf: isinstance(leaf, tuple))
    codes, expected, found = codes_of(imported(dtype)), plain(imported("float32")), plain(imported(dtype))
    assert codes.keys() == MATRICES and found.keys() == expected.keys()
    for name, array in expected.items():
        matrix = name.removeprefix("decoder/blocks/")
        if matrix in codes:
            assert codes[matrix].nbytes * (2 if dtype == "nf4" else 1) == array.size
            frozen = jax.jit(freeze, static_argnums=(1, 2, 3))(array, axes[name], dtype, "float32")
            np.testing.assert_array_equal(codes[matrix], frozen.codes)
            array = frozen.dequantized()
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.slow
def test_lora_over_the_same_bits_takes_the_codes_as_they_are(imported):
    definition = LoraDefinition(PLAIN.config, IDS, Lora(rank=2, base_dtype="nf4"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), definition.abstract())
    params = restoring.restore_initial(
        imported("nf4"),
        {"params": abstract},
        (definition.restore_rules()[0], (r"params/.*/(down|up)", None)),
        lambda: {"params": definition.init(jax.random.key(0))},
    )["params"]
    for name, codes in codes_of(imported("nf4")).items():
        part, matrix = name.split("/")
        np.testing.assert_array_equal(params["decoder"]["blocks"][part][matrix].base.codes, codes)
