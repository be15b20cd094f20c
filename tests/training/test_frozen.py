"""LoRA over a base in few bits, and a teacher in few bits: what they compute, checkpoints, and what reads them."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from diffusion_t5x import partitioning
from diffusion_t5x.checkpointing import checkpoints, restoring
from diffusion_t5x.checkpointing.assignment import named_leaves
from diffusion_t5x.checkpointing.record import Record
from diffusion_t5x.checkpointing.start import check_start
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.models.frozen import FrozenDefinition
from diffusion_t5x.models.low_rank import LowRank
from diffusion_t5x.models.quantized import Quantized, is_quantized
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.train import Training
from diffusion_t5x.training import optimizers
from diffusion_t5x.training.lora import Lora, LoraDefinition
from diffusion_t5x.training.state import TrainState, abstract_state, fresh_state, join, split
from diffusion_t5x.training.step import loss_and_gradients, make_train_step

BATCH = tiny.one_a_row(tiny.random_examples(0, [(n % 4, 6) for n in range(8)]), length=10)
EXPERTS = dataclasses.replace(
    tiny.EXPERTS, experts=dataclasses.replace(tiny.EXPERTS.experts, mlp_dim=8, shared_mlp_dim=8)
)
WIDE = dataclasses.replace(tiny.LLAMA, embed_dim=128, mlp_dim=128)  # two blocks of 64 inputs
PLAIN = ModelDefinition(tiny.LLAMA, tiny.VOCABULARY)
TARGETS = ("query", "value", "wi_0", "wo")  # key, out and wi_1 are frozen without factors


def define(dtype, config=tiny.LLAMA):
    return LoraDefinition(config, tiny.VOCABULARY, Lora(rank=3, alpha=6.0, targets=TARGETS, base_dtype=dtype))


def make(dtype, config=tiny.LLAMA):
    """A definition, and parameters with factors as they might be later."""
    definition = define(dtype, config)
    plain = tiny.random_params(ModelDefinition(config, tiny.VOCABULARY))
    params, rng = definition.adapt(plain, jax.random.key(1)), np.random.default_rng(2)
    some, frozen = split(definition, params)
    return definition, join(jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), some), frozen)


def dequantized(params):
    return jax.tree.map(lambda x: x.dequantized() if is_quantized(x) else x, params, is_leaf=is_quantized)


def merged(params):
    """The plain model, in double precision, one matrix at a time."""

    def one(leaf):
        base, *factors = (np.asarray(x, np.float64) for x in (leaf.base, leaf.down, leaf.up))
        return (base + 2.0 * np.matmul(*factors).reshape(base.shape)).astype(np.float32)

    return jax.tree.map(
        lambda leaf: one(leaf) if isinstance(leaf, LowRank) else leaf,
        dequantized(params),
        is_leaf=lambda leaf: isinstance(leaf, LowRank),
    )


def assert_close(found, expected, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), found, expected)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("dtype,config", [("int8", tiny.LLAMA), pytest.param("nf4", EXPERTS, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_over_the_dequantized_base(dtype, config):
    definition, params = make(dtype, config)
    quantized = [x for x in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(x)]
    matrices = {"query", "key", "value", "out", "wi_0", "wi_1", "wo"}
    names = {name for name, leaf in named_leaves(definition.axes(), is_quantized).items() if is_quantized(leaf)}
    assert {name.removesuffix("/base").rpartition("/")[2] for name in names} == matrices
    assert len(quantized) == len(names)
    number = sum(leaf.size for leaf in jax.tree.leaves(define("float32", config).abstract()))
    assert definition.num_params() == number
    step = jax.jit(
        lambda params, definition: loss_and_gradients(
            definition, Autoregressive().loss, params, BATCH, jax.random.key(0)
        ),
        static_argnums=1,
    )
    found, expected = step(params, definition), step(dequantized(params), define("float32", config))
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found[1]["decoder"]["blocks"]["attention"]["query"].down).max() > 1e-3


@dataclasses.dataclass
class Run:
    """Three steps over NF4 from a checkpoint of the plain model: the state before and after each, their losses."""

    definition: LoraDefinition
    abstract: TrainState
    step: object
    states: list
    losses: list


def start(folder, config=tiny.LLAMA):
    """A checkpoint of the plain model."""
    store = checkpoints.Checkpoints(str(folder), asynchronous=False)
    record = Record.of(config, tiny.VOCABULARY.describe(), Autoregressive())
    params = tiny.random_params(ModelDefinition(config, tiny.VOCABULARY))
    store.save(0, TrainState(jnp.int32(0), params, ()), {}, record.metadata())
    store.close()
    return str(folder)


def steps(mesh, path, config=tiny.LLAMA):
    definition, optimizer = define("nf4", config), optimizers.adamw(1e-2, max_grad_norm=1.0)
    rules = definition.restore_rules([("step|opt_state/.*", None)])
    with jax.set_mesh(mesh):
        abstract = abstract_state(mesh, definition, optimizer, keep_ema=True)
        init = functools.partial(fresh_state, definition, optimizer, True, jax.random.key(0))
        state = restoring.restore_initial(path, abstract, rules, init)
        step = make_train_step(mesh, abstract, definition, Autoregressive(), optimizer, seed=3, ema_decay=0.5)
        states, losses = [jax.device_get(state)], []
        for _ in range(3):
            state, metrics = step(state, partitioning.put_batch(mesh, BATCH))
            states.append(jax.device_get(state))
            losses.append(float(metrics["loss"]))
    return Run(definition, abstract, step, states, losses)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return start(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def run(plain):
    return steps(MeshConfig().make(), plain)


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("saved"))
    store = checkpoints.Checkpoints(folder, asynchronous=False)
    lora = run.definition.lora.describe()
    record = Record.of(tiny.LLAMA, tiny.VOCABULARY.describe(), Autoregressive(), lora=lora)
    store.save(2, run.states[2], {}, record.metadata())
    store.close()
    return folder


def test_training_starts_from_the_quantized_checkpoint_and_lowers_the_loss(run):
    fresh = run.definition.adapt(tiny.random_params(PLAIN), jax.random.key(0))
    assert_same(split(run.definition, run.states[0].params)[1], split(run.definition, fresh)[1])
    before, after = (split(run.definition, state.params)[1] for state in (run.states[0], run.states[-1]))
    assert_same(before, after)
    assert run.losses[2] < run.losses[1] < run.losses[0]


def test_a_restored_run_goes_on_bit_for_bit(run, saved):
    assert "as in the checkpoint" in check_start(saved, tiny.VOCABULARY, run.abstract, merge=False, resumes=True)
    state, _, metadata = restoring.restore(saved, run.abstract)
    assert metadata["lora"]["base_dtype"] == "nf4"
    assert_same(state, run.states[2])
    mesh = MeshConfig().make()
    with jax.set_mesh(mesh):
        state, _ = run.step(state, partitioning.put_batch(mesh, BATCH))
    assert_same(state, run.states[3])


@pytest.mark.slow
def test_every_other_reader_gets_the_dequantized_and_merged_model(run, saved):
    raw, average = merged(run.states[2].params), merged(run.states[2].eval_params)
    definition, params = load_model(saved, tiny.LLAMA, tiny.VOCABULARY, MeshConfig().make())
    assert type(definition) is ModelDefinition
    assert_close(params, average, rtol=1e-5, atol=1e-5)
    shapes, read = restoring.open_params(saved, use_ema=False)
    assert shapes == {name: leaf.shape for name, leaf in named_leaves(PLAIN.abstract()).items()}
    assert_close({name: read(name) for name in shapes}, named_leaves(raw), rtol=1e-5, atol=1e-5)


def test_another_run_starts_from_the_merged_model_and_quantizes_it_again(run, saved):
    definition, optimizer, mesh = define("int8"), optax.adam(1e-2), MeshConfig().make()
    abstract = abstract_state(mesh, definition, optimizer, keep_ema=False)
    rules = definition.restore_rules([("step|opt_state/.*", None)])
    check_start(saved, tiny.VOCABULARY, abstract, rules)
    init = functools.partial(fresh_state, definition, optimizer, False, jax.random.key(0))
    found = restoring.restore_initial(saved, abstract, rules, init).params["decoder"]["blocks"]["mlp"]
    expected = merged(run.states[2].params)["decoder"]["blocks"]["mlp"]
    for base, matrix in ((found["wo"].base, expected["wo"]), (found["wi_1"], expected["wi_1"])):
        assert base.codes.dtype == jnp.int8
        step = np.abs(matrix).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(base.dequantized() - matrix) <= step * 0.5001)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_teacher_is_quantized_as_it_is_read(plain, dtype):
    config = dataclasses.replace(tiny.LLAMA, dtype="bfloat16")
    definition, params = load_model(plain, config, tiny.VOCABULARY, MeshConfig().make(), few_bits=dtype)
    assert isinstance(definition, FrozenDefinition)
    blocks = params["decoder"]["blocks"]
    assert isinstance(blocks["mlp"]["wo"], Quantized) and params["head"].dtype == jnp.bfloat16
    expected = define(dtype).adapt(tiny.random_params(PLAIN), jax.random.key(0))["decoder"]["blocks"]
    for part, name in (("attention", "key"), ("attention", "out"), ("mlp", "wi_1")):
        assert_same(blocks[part][name], expected[part][name])
    assert_same(blocks["mlp"]["wo"], expected["mlp"]["wo"].base)


def test_nothing_frozen_is_refused():
    settings = {"model_dir": "/x", "model": tiny.LLAMA, "train_dataset": None, "optimizer": None, "train_steps": 1}
    with pytest.raises(UserError, match=r"FROZEN_DTYPE = 'nf4' .* neither LoRA nor a teacher\. Give runs/lora\.gin"):
        Training(objective=Masked(), frozen_dtype="nf4", **settings)
    assert Training(objective=Masked(), frozen_dtype="nf4", lora=Lora(), **settings).lora.base_dtype == "nf4"
    taught = Training(objective=Masked(), frozen_dtype="int8", teacher_checkpoint_path="/t", **settings)
    assert taught.lora is None


PROGRAM = """
import json, sys, jax, test_frozen
from diffusion_t5x.partitioning import MeshConfig
mesh = MeshConfig(data=1, fsdp=2, tensor=2).make(jax.devices()[:4])
found = test_frozen.steps(mesh, sys.argv[1], test_frozen.WIDE)
base = found.abstract.params["decoder"]["blocks"]["mlp"]["wo"].base
print(json.dumps({"losses": found.losses, "codes": base.codes.sharding.shard_shape(base.codes.shape)}))
"""


@pytest.mark.slow
def test_four_devices_that_shard_the_codes_compute_what_one_does(tmp_path, eight_devices):
    path = start(tmp_path, WIDE)
    folder = pathlib.Path(__file__).parent
    environment = eight_devices | {
        "PYTHONPATH": ":".join([str(folder), str(folder.parent / "helpers"), *filter(None, sys.path)])
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(found["losses"], steps(MeshConfig().make(), path, WIDE).losses, rtol=1e-5)
    assert found["codes"] == [2, 32, 64]  # of [2, 64, 128]: layers, half of mlp, half of embed
