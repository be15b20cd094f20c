"""The choice of the backend of attention: by itself, and in models that are traced for devices not there."""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from diffusion_t5x import partitioning
from diffusion_t5x.errors import UserError
from diffusion_t5x.models import dot_product
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.dot_product import Call, choose
from diffusion_t5x.models.masks import BIDIRECTIONAL, CAUSAL, PREFIX, Slots
from diffusion_t5x.models.transformer import ModelDefinition

TPU = Call(platform="tpu", dtype="bfloat16", head_dim=64, query_length=512, key_length=256)
GPU = dataclasses.replace(TPU, platform="gpu", capability=(8, 0))
CPU = dataclasses.replace(TPU, platform="cpu")


@pytest.mark.parametrize(
    "call,changes,expected",
    [
        (TPU, {}, "splash"),
        (TPU, {"dtype": "float32", "head_dim": 80, "has_softcap": True}, "splash"),
        (TPU, {"has_bias": True}, "flash"),
        (TPU, {"has_bias": True, "head_dim": 256}, "flash"),
        (GPU, {}, "cudnn"),
        (GPU, {"has_bias": True, "dtype": "float16", "head_dim": 128}, "cudnn"),
        (GPU, {"head_dim": 256, "capability": (9, 0)}, "cudnn"),
    ],
)
def test_auto_takes_the_devices_kernel(call, changes, expected):
    assert choose("auto", dataclasses.replace(call, **changes))[0] == expected


REFUSED = [
    ("splash", TPU, {"query_length": 1}, "fewer than 128 queries or keys, here 1 queries and 256 keys"),
    ("splash", TPU, {"key_length": 127}, "here 512 queries and 127 keys"),
    ("splash", TPU, {"length_is_cut": True}, "the mesh cuts the length"),
    ("splash", TPU, {"heads_are_cut_alike": False}, "query heads otherwise"),
    ("flash", TPU, {"has_bias": True, "has_softcap": True}, "no soft cap"),
    ("flash", TPU, {"has_bias": True, "head_dim": 160}, "up to 128 or that 128 divides, not 160"),
    ("cudnn", GPU, {"dtype": "float32"}, "bfloat16 or float16, not float32"),
    ("cudnn", GPU, {"head_dim": 136}, "up to 128 on this GPU, not 136"),
    ("cudnn", GPU, {"head_dim": 264, "capability": (9, 0)}, "up to 256 on this GPU, not 264"),
    ("cudnn", GPU, {"head_dim": 60}, "that 8 divides"),
    ("cudnn", GPU, {"query_length": 511}, "even lengths, not 511 queries"),
    ("cudnn", GPU, {"has_softcap": True}, "no soft cap"),
    ("cudnn", GPU, {"capability": None}, "needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("backend,call,changes,reason", REFUSED)
def test_what_a_kernel_cannot_do_is_left_to_xla_or_refused(backend, call, changes, reason):
    call = dataclasses.replace(call, **changes)
    found, why = choose("auto", call)
    assert found == "xla" and reason in why
    with pytest.raises(
        UserError, match=rf'attention_backend = "{backend}" cannot be used: .*{re.escape(reason)}.*"auto"'
    ):
        choose(backend, call)
    # Over a cache there is no other way, whatever was asked for.
    assert choose(backend, dataclasses.replace(call, whole=False)) == ("xla", why)


@pytest.mark.parametrize(
    "backend,call,reason",
    [
        ("splash", dataclasses.replace(TPU, has_bias=True), "splash attention takes no relative position bias"),
        ("splash", CPU, "splash does not run on a cpu"),
        ("flash", GPU, "flash does not run on a gpu"),
        ("cudnn", TPU, "cudnn does not run on a tpu"),
    ],
)
def test_another_devices_kernel_is_refused(backend, call, reason):
    with pytest.raises(UserError, match=reason):
        choose(backend, call)


def test_xla_is_taken_where_it_is_asked_for_and_where_there_is_nothing_else():
    assert choose("xla", TPU)[0] == "xla"
    assert choose("auto", CPU) == ("xla", "no fused kernel on CPU")
    assert choose("flash", TPU)[0] == "flash"  # without a bias as well


LENGTH = 128


@pytest.fixture
def trace(monkeypatch):
    """Traces a model on a mesh of TPU chips, none of which is here; gives the program's text, and what the log says."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    lines = []
    monkeypatch.setattr(dot_product, "_told", set())
    monkeypatch.setattr(dot_product.logger, "info", lambda text, *parts: lines.append(text % parts))

    def trace(config, run, **sizes):
        sizes = dict.fromkeys(partitioning.MESH_AXES, 1) | sizes
        axis_types = (jax.sharding.AxisType.Auto,) * len(sizes)
        mesh = jax.sharding.AbstractMesh(
            tuple(sizes.values()), tuple(sizes), axis_types=axis_types, abstract_device=device
        )
        definition = ModelDefinition(config, tiny.VOCABULARY)
        with jax.sharding.use_abstract_mesh(mesh):
            return str(jax.make_jaxpr(lambda params: run(definition.bind(params)))(definition.abstract())), lines

    return trace


def whole_rows(kind, length=LENGTH):
    batch = tiny.pack_apart([[([3], [4])]] * 4, length, length)
    return lambda model: model(batch.tokens, Slots.of(batch), kind, model.encode(batch)).hidden


@pytest.mark.parametrize("kind", [CAUSAL, BIDIRECTIONAL, PREFIX], ids=lambda kind: kind.name)
def test_models_are_traced_for_the_devices_of_the_mesh(trace, kind):
    program, lines = trace(tiny.LLAMA, whole_rows(kind), fsdp=2, tensor=2)
    assert "pallas_call" in program and lines == ["Attention: splash (it suits device and model)."]


def test_a_relative_bias_is_for_flash_and_cross_attention_has_none(trace):
    program, lines = trace(tiny.ENCODER_DECODER, whole_rows(CAUSAL), data=4)
    assert "flash_attention" in program and "splash" in program
    assert [line.partition(" (")[0] for line in lines] == ["Attention: flash", "Attention: splash"]


@pytest.mark.parametrize(
    "length,sizes,reason",
    [
        (100, {}, "fewer than 128 queries or keys, here 100 queries and 100 keys"),
        (LENGTH, {"sequence": 2}, "cuts the length"),
    ],
)
def test_the_log_says_once_why_it_is_xla(trace, length, sizes, reason):
    for _ in range(2):
        program, lines = trace(tiny.LLAMA, whole_rows(CAUSAL, length), **sizes)
    assert "pallas_call" not in program
    assert len(lines) == 1 and lines[0].startswith("Attention: XLA (") and reason in lines[0]


@pytest.mark.parametrize("asked", ["auto", "splash"])
def test_over_a_cache_single_tokens_are_left_to_xla_without_a_word(trace, asked):
    batch = tiny.one_a_row([([3], [4])] * 2, LENGTH)

    def step(model):
        cache = KVCache.empty(model.config, Slots.of(batch))
        return model.extend(batch.tokens[:, :1], CAUSAL, cache, np.zeros(2, np.int32))[0]

    program, lines = trace(dataclasses.replace(tiny.LLAMA, attention_backend=asked), step)
    assert "pallas_call" not in program and not lines


def test_a_model_that_cannot_have_what_it_asks_for_is_refused(trace):
    with pytest.raises(UserError, match="takes no relative position bias"):
        trace(dataclasses.replace(tiny.RELATIVE, attention_backend="splash"), whole_rows(CAUSAL))
    model = tiny.make_model(dataclasses.replace(tiny.RELATIVE, attention_backend="flash"))
    with pytest.raises(UserError, match="flash does not run on a cpu"):
        whole_rows(CAUSAL)(model[0].bind(model[1]))


ON_GPU = """
import sys
import jax, jax.numpy as jnp, numpy as np
sys.path[:0] = sys.argv[1:]
import test_attention_kernels as kernels
from diffusion_t5x.models import dot_product

for name in kernels.SIGHTS:
    for biased in (False, True):
        sight = jax.tree.map(jnp.asarray, kernels.SIGHTS[name]())
        given = [x.astype(jnp.bfloat16) for x in kernels.arrays(sight, 2)]
        bias = kernels.random_bias(sight) if biased else None
        found, expected = (
            kernels.results(lambda q, k, v, b: run(q, k, v, b, sight, 0.5, None), given, bias)
            for run in (lambda *x: dot_product.by_kernel("cudnn", *x), dot_product.xla)
        )
        close = lambda x, y: np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=0.05, atol=0.05)
        jax.tree.map(close, found, expected)
print("the same")
"""


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no NVIDIA GPU")
def test_cudnn_is_attention():
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}
    here = pathlib.Path(__file__).parent
    folders = [str(here), str(here.parent / "helpers")]
    command = [sys.executable, "-c", ON_GPU, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if "Unable to initialize backend" in done.stderr:
        pytest.skip("this JAX has no CUDA")
    assert done.stdout == "the same\n", done.stderr[-3000:]
