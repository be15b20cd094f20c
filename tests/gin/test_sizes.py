"""The sizes against published dimensions and parameter counts: T5 1.1's with a vocabulary of 256,000, and Qwen3's."""

import gin
import pytest

from diffusion_t5x.command_line import config
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.experts import Experts
from diffusion_t5x.models.transformer import ModelDefinition

# 256,000 rows with MASK: 2,000 times the 128 to which the embedding is rounded.
VOCABULARY = TokenIds(size=256_000, pad_id=0, eos_id=1, mask_id=255_999, start_id=0, noise_ranges=((2, 255_999),))
# d_model, layers, heads, d_kv, d_ff, relative buckets of T5 1.1's gin files; tiny is ours.
DIMENSIONS = {
    "tiny": (96, 4, 3, 32, 256, 128),
    "small": (512, 8, 6, 64, 1024, 32),
    "base": (768, 12, 12, 64, 2048, 32),
    "large": (1024, 24, 16, 64, 2816, 32),
    "xl": (2048, 24, 32, 64, 5120, 32),
}
GOLDEN = {
    ("tiny", "decoder_only"): 25_019_616,
    ("tiny", "encoder_decoder"): 50_187_072,
    ("small", "decoder_only"): 149_955_264,
    ("small", "encoder_decoder"): 306_206_080,
    ("base", "decoder_only"): 281_562_240,
    ("base", "encoder_decoder"): 591_445_248,
    ("large", "decoder_only"): 570_476_032,
    ("large", "encoder_decoder"): 1_241_639_936,
    ("xl", "decoder_only"): 1_682_017_280,
    ("xl", "encoder_decoder"): 3_766_736_896,
}


def closed_form(size: str, model: str) -> int:
    d, layers, heads, d_kv, d_ff, buckets = DIMENSIONS[size]
    attention, mlp, norm, bias = 4 * d * heads * d_kv, 3 * d * d_ff, d, buckets * heads
    stack = layers * (attention + mlp + 2 * norm) + norm + bias
    if model == "decoder_only":
        return 256_000 * d + stack
    cross_attention = layers * (attention + norm)
    return 2 * 256_000 * d + 2 * stack + cross_attention  # embedding and output matrix, encoder, decoder


def num_params(size: str, model: str) -> int:
    config.load([f"models/{model}.gin", f"sizes/{size}.gin"])
    return ModelDefinition(ModelConfig(**gin.get_bindings(ModelConfig)), VOCABULARY).num_params()


@pytest.mark.parametrize("model", ["decoder_only", "encoder_decoder"])
@pytest.mark.parametrize("size", DIMENSIONS)
def test_number_of_parameters(size, model):
    assert num_params(size, model) == closed_form(size, model) == GOLDEN[size, model]


@pytest.mark.parametrize(
    ("size", "model", "published", "unit"),
    [  # arXiv 2401.17181, section 4
        ("base", "decoder_only", 280e6, 10e6),
        ("base", "encoder_decoder", 590e6, 10e6),
        ("xl", "decoder_only", 1.7e9, 0.1e9),
    ],
)
def test_the_paper_rounds_to_the_same(size, model, published, unit):
    assert round(num_params(size, model) / unit) * unit == pytest.approx(published)


QWEN3 = {  # of the published checkpoints (huggingface.co/Qwen/Qwen3-*): hidden, layers, heads, mlp, tied
    "0p6b": ((1024, 28, 16, 3072, True), 596_049_920),
    "1p7b": ((2048, 28, 16, 6144, True), 1_720_574_976),
    "4b": ((2560, 36, 32, 9728, True), 4_022_468_096),
    "8b": ((4096, 36, 32, 12288, False), 8_190_735_360),
}


@pytest.mark.parametrize("size", QWEN3)
def test_number_of_parameters_of_qwen3(size):
    (d, layers, heads, d_ff, tied), published = QWEN3[size]
    attention = 2 * d * heads * 128 + 2 * d * 8 * 128 + 2 * 128  # query and out, key and value, their norms
    closed_form = (1 if tied else 2) * 151_936 * d + layers * (attention + 3 * d * d_ff + 2 * d) + d
    config.load(["models/qwen3.gin", f"sizes/qwen3_{size}.gin"])
    vocabulary = TokenIds(size=151_670, pad_id=0, eos_id=1, mask_id=151_669, start_id=0, noise_ranges=((2, 151_669),))
    found = ModelDefinition(ModelConfig(**gin.get_bindings(ModelConfig)), vocabulary).num_params()
    assert found == closed_form == published


# Mixtures of experts: hidden, layers, heads, key-value heads, first layers without experts and their width, experts,
# their width, that of the shared ones, vocabulary (huggingface.co/Qwen/Qwen3-30B-A3B, github.com/inclusionAI/dFactory).
MIXTURES = {
    "qwen3_30b_a3b": ("qwen3", (2048, 48, 32, 4, 0, 0, 128, 768, 0, 151_936), 30_532_122_624),
    "llada2_mini": ("llada2", (2048, 20, 16, 4, 1, 5120, 256, 512, 512, 157_184), 16_255_643_392),
}


@pytest.mark.parametrize("size", MIXTURES)
def test_number_of_parameters_of_mixtures(size):
    model, (d, layers, heads, kv_heads, dense, d_ff, number, inner, shared, rows), published = MIXTURES[size]
    attention = 2 * d * heads * 128 + 2 * d * kv_heads * 128 + 2 * 128
    bias = number if model == "llada2" else 0
    mixture = d * number + bias + 3 * d * (number * inner + shared)
    stack = layers * (attention + 2 * d) + dense * 3 * d * d_ff + (layers - dense) * mixture + d
    config.load([f"models/{model}.gin", f"sizes/{size}.gin"])
    vocabulary = TokenIds(size=rows, pad_id=0, eos_id=1, mask_id=rows - 1, start_id=0, noise_ranges=((2, rows - 1),))
    bindings = gin.get_bindings(ModelConfig) | {"experts": Experts(**gin.get_bindings(Experts))}
    found = ModelDefinition(ModelConfig(**bindings), vocabulary).num_params()
    assert found == 2 * rows * d + stack == published
