"""Kernels that run elsewhere, interpreted here, against plain XLA: what comes out, and all gradients."""

import dataclasses
import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.pallas import tpu as pltpu

from diffusion_t5x.models import dot_product, positions
from diffusion_t5x.models.masks import BIDIRECTIONAL, CAUSAL, PREFIX, Annealed, AttentionKind, Sight, Slots

ROWS, LENGTH, HEADS, HEAD_DIM = 3, 384, 4, 8  # three blocks of the kernels
# A row of three packed texts and padding, one of a single text, one of nothing.
TEXTS = ((100, 150, 90), (LENGTH,), ())


def slots(length=LENGTH, copies=1):
    """Slots of the rows in TEXTS; a third of each text is its inputs."""
    segment_ids, positions = np.zeros((2, ROWS, length), np.int32)
    is_input = np.zeros((ROWS, length), bool)
    for row, sizes in enumerate(TEXTS):
        start = 0
        for segment, size in enumerate(sizes, start=1):
            segment_ids[row, start : start + size] = segment
            positions[row, start : start + size] = np.arange(size)
            is_input[row, start : start + size // 3] = True
            start += size
    return Slots(segment_ids=segment_ids, positions=positions, is_input=is_input)


def clean_and_noisy():
    """The same in half the length, and the targets once more, as block diffusion has it."""
    whole = slots()
    half = jax.tree.map(lambda x: x[:, : LENGTH // 2], whole)
    nothing = np.zeros_like(half.is_input)
    return Slots(
        segment_ids=np.concatenate([half.segment_ids, np.where(half.is_input, 0, half.segment_ids)], axis=1),
        positions=np.tile(half.positions, 2),
        is_input=np.concatenate([half.is_input, nothing], axis=1),
        is_noisy=np.concatenate([nothing, ~nothing], axis=1),
        index=np.tile(np.arange(LENGTH // 2), 2)[None],
    )


def near(kind, window):
    whole = slots()
    sight = Sight.of(kind, whole, whole, whole=True)
    return sight.replace(mask=sight.mask & whole.within(whole, window), order=None)


def of(kind, of_slots):
    return Sight.of(kind, of_slots, of_slots, whole=True)


def inputs_of_others():
    """The sight of inputs from targets: the second text of the first row has no inputs, the last row is empty."""
    queries, keys = slots().segment_ids, slots().segment_ids[:, :256].copy()
    keys[keys == 2] = 3
    return Sight.across(queries, keys, whole=True)


def cut(some_slots, length):
    return jax.tree.map(lambda x: x[:, :length], some_slots)


SIGHTS = {
    "odd causal": lambda: of(CAUSAL, cut(slots(), 301)),
    "odd block_diffusion": lambda: of(AttentionKind("block_diffusion", 7), cut(clean_and_noisy(), 301)),
    "causal": lambda: of(CAUSAL, slots()),
    "bidirectional": lambda: of(BIDIRECTIONAL, slots()),
    "prefix": lambda: of(PREFIX, slots()),
    "block_diffusion": lambda: of(AttentionKind("block_diffusion", 7), clean_and_noisy()),
    "annealed": lambda: of(Annealed(BIDIRECTIONAL, jnp.float32(0.5), jax.random.key(0)), slots()),
    "window": lambda: near(CAUSAL, 50),
    "across": inputs_of_others,
}


def arrays(sight, kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    _, queries, keys = sight.mask.shape
    sizes = (queries, HEADS), (keys, kv_heads), (keys, kv_heads), (queries, HEADS)
    return [jnp.asarray(rng.standard_normal((ROWS, *size, HEAD_DIM), np.float32)) for size in sizes]


def results(run, arrays, bias):
    """Gradients of the output's product with random weights, padding included, and the output."""
    *inputs, weights = arrays

    def loss(inputs, bias):
        attended = run(*inputs, bias)
        return jnp.sum(attended * weights), attended

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(inputs, bias)


def compare(backend, sight, kv_heads=HEADS, bias=None, cap=None, scale=0.5):
    """Float32: what is left between two orders of summing 384 products is some 1e-6 of numbers about 1."""
    sight = jax.tree.map(jnp.asarray, sight)
    given = arrays(sight, kv_heads)

    def by(function):
        return lambda query, key, value, bias: function(query, key, value, bias, sight, scale, cap)

    expected = results(by(dot_product.xla), given, bias)
    with interpreted():
        found = results(by(functools.partial(dot_product.by_kernel, backend)), given, bias)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), found, expected)


def interpreted():
    """Kernels run as plain JAX in here: far faster than the simulated memory that is the default."""
    return pltpu.force_tpu_interpret_mode(True)


def random_bias(sight, count=1):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((count, HEADS, *sight.mask.shape[1:]), np.float32))


@pytest.mark.parametrize("name", SIGHTS)
def test_splash_is_attention(name):
    compare("splash", SIGHTS[name]())


def test_splash_with_grouped_heads_and_capped_products_is_attention():
    compare("splash", SIGHTS["bidirectional"](), kv_heads=2, cap=1.5)


@pytest.mark.parametrize("name,kv_heads", [("odd causal", HEADS), ("block_diffusion", 2)])
def test_flash_with_a_bias_is_attention(name, kv_heads):
    sight = SIGHTS[name]()
    compare("flash", sight, kv_heads, bias=random_bias(sight))


def test_flash_without_a_bias_is_attention():
    compare("flash", SIGHTS["across"]())


def test_flash_with_a_bias_for_each_row_is_attention():
    sight = SIGHTS["bidirectional"]()
    compare("flash", sight, bias=random_bias(sight, ROWS))


@pytest.mark.parametrize("backend,name", [("splash", "causal"), ("splash", "prefix"), ("flash", "causal")])
def test_a_step_runs_a_kernel_once_forward_and_its_two_backward(backend, name):
    sight = SIGHTS[name]()

    def loss(query, key, value, bias):
        return jnp.sum(dot_product.by_kernel(backend, query, key, value, bias, sight, 1.0, None))

    given = [*arrays(sight, HEADS)[:3], random_bias(sight) if backend == "flash" else None]
    program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*given))
    assert program.count("pallas_call[") == 3


LONG = tiny.pack([tiny.random_examples(0, [(30, 40), (20, 30)]), tiny.random_examples(1, [(8, 120)])], 128)
APART = tiny.pack_apart([tiny.random_examples(0, [(30, 40), (0, 30)]), tiny.random_examples(1, [(8, 90)])], 128, 128)
LLAMA = dataclasses.replace(tiny.LLAMA, attention_softcap=3.0, local_layers=(True, False), window=9, remat="full")
T5 = tiny.ENCODER_DECODER


@pytest.mark.slow
@pytest.mark.parametrize(
    "config,batch,used",
    [(LLAMA, LONG, {"splash"}), (T5, APART, {"flash", "splash"})],
    ids=["llama", "t5"],
)
def test_models_learn_the_same_by_kernels(config, batch, used, monkeypatch):
    definition, params = tiny.make_model(config)

    def loss(params):
        model = definition.bind(params)
        logits = model.logits(model(batch.tokens, Slots.of(batch), CAUSAL, model.encode(batch)).hidden)
        return jnp.mean(jnp.where(batch.target_mask[..., None], logits, 0) ** 2)

    expected = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(dot_product, "platform", lambda: "tpu")
    monkeypatch.setattr(positions, "platform", lambda: "tpu")
    monkeypatch.setattr(dot_product, "_told", set())
    with interpreted():
        found = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    assert dot_product._told == used
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), found, expected)


HERE = pathlib.Path(__file__).parent
FOLDERS = [str(HERE), str(HERE.parent / "helpers")]
MESH = """
import sys
import jax, numpy as np
import jax.numpy as jnp
sys.path[:0] = sys.argv[1:]
import test_attention_kernels as kernels
from diffusion_t5x.models import dot_product
from diffusion_t5x.partitioning import MeshConfig

sight = jax.tree.map(lambda x: jnp.asarray(x)[:2], kernels.SIGHTS["prefix"]())
given = [x[:2] for x in kernels.arrays(sight, kv_heads=2)]
bias = kernels.random_bias(sight)

def results(run, bias):
    return jax.device_get(kernels.results(lambda *x: run(*x, sight, 0.5, None), given, bias))

with jax.set_mesh(MeshConfig(data=1, fsdp=2, tensor=2).make(jax.devices()[:4])):
    for backend, bias in (("splash", None), ("flash", jnp.repeat(bias, 2, axis=0))):  # a copy for each piece of rows
        with kernels.interpreted():
            found = results(lambda *x: dot_product.by_kernel(backend, *x), bias)
        expected = results(dot_product.xla, bias)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), found, expected)
print("the same")
"""


@pytest.mark.slow
def test_each_device_runs_a_kernel_on_its_rows_and_heads(eight_devices):
    command = [sys.executable, "-c", MESH, *FOLDERS]
    done = subprocess.run(command, env=eight_devices, capture_output=True, text=True, timeout=300)
    assert done.stdout == "the same\n", done.stderr[-3000:]
