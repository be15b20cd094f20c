"""Checkpoints: bits, meshes, assignment rules, what is kept, and what a killed process leaves behind."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_t5x.checkpointing import checkpoints, restoring, stored
from diffusion_t5x.errors import UserError
from diffusion_t5x.training import optimizers


def make_mesh(*shape):
    if len(jax.devices()) < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def init_state(seed=0, ema=False):
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    params = {
        "embedding": jax.random.normal(next(keys), (16, 8)),
        "blocks": {"mlp": {"wi": jax.random.normal(next(keys), (2, 8, 24)), "half": jnp.full((8,), 0.1, jnp.bfloat16)}},
    }
    state = {"step": jnp.int32(seed), "params": params, "opt_state": optimizers.adamw(1e-3).init(params)}
    return state | ({"ema": jax.tree.map(lambda x: x + 1, params)} if ema else {})


def abstract(state, sharding=lambda shape: None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x.shape)), state)


def on(mesh):
    """Shardings that cut the last axis over fsdp where it divides, and the first over data where it does."""

    def sharding(shape):
        spec = [None] * len(shape)
        if shape and shape[-1] % 8 == 0:
            spec[-1] = "fsdp"
        if len(shape) > 1 and shape[0] % 8 == 0:
            spec[0] = "data"
        return NamedSharding(mesh, P(*spec))

    return sharding


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture
def saved(tmp_path):
    """A MODEL_DIR with checkpoints of steps 3 and 7, the second with a moving average."""
    store = checkpoints.Checkpoints(tmp_path / "checkpoints")
    store.save(3, init_state(3), {}, {"step": 3})
    store.save(7, init_state(7, ema=True), {}, {"step": 7})
    store.close()
    return tmp_path


@pytest.mark.slow
def test_the_tests_of_meshes_pass_where_there_are_eight_devices(eight_devices):
    if len(jax.devices()) >= 8:
        pytest.skip("this is the process with eight devices")
    names = "another_mesh or assignment_rules_rename"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", names]
    process = subprocess.run(command, env=eight_devices, capture_output=True, text=True)
    assert process.returncode == 0 and "2 passed" in process.stdout, process.stdout


def test_restores_the_same_bits_onto_another_mesh(tmp_path):
    state = init_state(1, ema=True)
    save_mesh, restore_mesh = make_mesh(4, 2), make_mesh(1, 8)
    sharded = jax.tree.map(lambda x: jax.device_put(x, on(save_mesh)(x.shape)), state)
    data_state = {"position": np.array(2**40 + 1), "rng/state": np.array([2**64 - 1, 5], np.uint64)}
    metadata = {"step": 5, "tokenizer": {"name": "é", "mask_id": 3}, "gin": "A = 1\n", "metrics": {"loss": 0.1}}
    store = checkpoints.Checkpoints(tmp_path)
    store.save(5, sharded, data_state, metadata)
    store.close()

    restored, restored_data, restored_metadata = restoring.restore(tmp_path, abstract(state, on(restore_mesh)))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    for x in jax.tree.leaves(restored):
        assert x.sharding == on(restore_mesh)(x.shape)
    assert restored["params"]["embedding"].addressable_shards[0].data.shape == (16, 1)
    assert restored_metadata == metadata
    assert {name: (x.dtype, x.tolist()) for name, x in restored_data.items()} == {
        name: (x.dtype, x.tolist()) for name, x in data_state.items()
    }
    assert (tmp_path / "checkpoint_5").is_dir()


def test_saved_state_may_be_donated_and_data_state_changed_at_once(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    store = checkpoints.Checkpoints(tmp_path, keep_last=9)
    values = np.random.default_rng(0).random((4, 1 << 20), np.float32)
    for step in range(3):
        state = {"a": jnp.array(values + step), "b": jnp.array(values[0] + step)}
        data_state = {"position": np.array([step])}
        jax.block_until_ready(state)
        store.save(step, state, data_state, {})
        data_state["position"][:] = 99
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
    for step in range(3):
        store.wait()
        restored, data_state, _ = restoring.restore(tmp_path / f"checkpoint_{step}", abstract(state))
        np.testing.assert_array_equal(restored["a"], values + step)
        np.testing.assert_array_equal(restored["b"], values[0] + step)
        assert data_state["position"].tolist() == [step]


@pytest.mark.parametrize("mode,best", [("max", [2, 5]), ("min", [3, 6])])
def test_keeps_the_last_and_the_best_across_restarts(tmp_path, mode, best):
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: float("nan"), 5: 0.8, 6: 0.2, 7: None, 8: 0.4, 9: 0.3}
    for step, score in scores.items():
        # A new object for every save: what is best is read back from the disk.
        store = checkpoints.Checkpoints(tmp_path, keep_last=2, keep_best=2, best_metric="bleu", best_mode=mode)
        store.save(step, {"x": jnp.zeros(2)}, {}, {"metrics": {} if score is None else {"bleu": score}})
        store.close()
    assert checkpoints.steps(tmp_path) == [*best, 8, 9]
    assert checkpoints.latest(tmp_path) == str(tmp_path / "checkpoint_9")


def test_saving_a_step_again_changes_nothing(tmp_path):
    store = checkpoints.Checkpoints(tmp_path, asynchronous=False)
    assert checkpoints.latest(tmp_path) is None
    store.save(1, {"x": jnp.zeros(2)}, {}, {"first": True})
    store.save(1, {"x": jnp.ones(2)}, {}, {"first": False})
    restored, _, metadata = restoring.restore(tmp_path, abstract({"x": jnp.zeros(2)}))
    assert metadata == {"first": True} and restored["x"].tolist() == [0, 0]


def test_find_checkpoint_takes_what_users_give(saved):
    for path in (saved, saved / "checkpoints", saved / "checkpoints" / "checkpoint_7"):
        assert checkpoints.find_checkpoint(str(path)) == saved / "checkpoints" / "checkpoint_7"
    assert checkpoints.read_metadata(str(saved / "checkpoints" / "checkpoint_3")) == {"step": 3}


def test_find_checkpoint_says_what_is_there_instead(saved, tmp_path):
    with pytest.raises(UserError, match=r"checkpoint_5: it does not exist. The folder has the steps 3, 7"):
        checkpoints.find_checkpoint(str(saved / "checkpoints" / "checkpoint_5"))
    with pytest.raises(UserError, match="nowhere: it does not exist"):
        checkpoints.find_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: it holds no finished checkpoint"):
        checkpoints.find_checkpoint(str(tmp_path / "empty"))


def test_restore_params_reads_parameters_or_their_average(saved):
    state = init_state(7, ema=True)
    params = abstract(state["params"])
    assert bits(restoring.restore_params(str(saved), params)) == bits(state["params"])
    assert bits(restoring.restore_params(str(saved), params, use_ema=True)) == bits(state["ema"])
    without = str(saved / "checkpoints" / "checkpoint_3")
    assert bits(restoring.restore_params(without, params, use_ema=True)) == bits(init_state(3)["params"])


def test_widths_of_floating_point_convert(saved):
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), init_state()["params"])
    restored = restoring.restore_params(str(saved), params)
    expected = init_state(7)["params"]["embedding"].astype(jnp.bfloat16)
    assert bits(restored["embedding"]) == bits(expected)


def test_assignment_rules_rename_keep_fresh_and_fill_two_targets(saved):
    """AR2Diff's way: parameters from elsewhere, a new optimizer and step, the average starting at the parameters."""
    mesh = make_mesh(1, 8)
    old = init_state(7)["params"]

    def init():
        keys = jax.random.split(jax.random.key(99), 2)
        params = {
            "embed": jax.random.normal(keys[0], (16, 8)),
            "blocks": {"mlp": {"wi": jnp.zeros((2, 8, 24)), "half": jnp.zeros(8)}},
            "head": jax.random.normal(keys[1], (8, 5)),
        }
        opt_state = optimizers.adafactor(1e-2).init(params)
        return {"step": jnp.int32(0), "params": params, "opt_state": opt_state, "ema": {"wi": jnp.zeros((2, 8, 24))}}

    abstract_state = abstract(jax.eval_shape(init), on(mesh))
    rules = [
        (r"params/embed", "params/embedding"),
        (r"ema/(.*)", r"params/blocks/mlp/\1"),
        (r"ema/.*", None),  # drops the averages that the checkpoint has
        (r"step|opt_state/.*|params/head", None),
    ]
    state = restoring.restore_initial(str(saved), abstract_state, rules, init)
    assert bits(state["params"]["embed"]) == bits(old["embedding"])
    assert bits(state["params"]["blocks"]["mlp"]["wi"]) == bits(old["blocks"]["mlp"]["wi"]) == bits(state["ema"]["wi"])
    assert bits(state["params"]["head"]) == bits(init()["params"]["head"])
    assert bits(state["opt_state"]) == bits(init()["opt_state"])
    assert state["step"] == 0
    for x in jax.tree.leaves(state):
        assert x.sharding == on(mesh)(x.shape)
    # No two leaves share a buffer, so all may be donated.
    jax.jit(lambda tree: jax.tree.map(jnp.sum, tree), donate_argnums=0)(state)


def test_what_does_not_fit_is_one_table(saved):
    state = abstract(init_state(7, ema=True))
    state["params"]["blocks"]["mlp"]["wi"] = jax.ShapeDtypeStruct((2, 8, 32), jnp.float32)
    state["params"]["head"] = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    state["step"] = jax.ShapeDtypeStruct((), jnp.float32)
    del state["params"]["embedding"]
    with pytest.raises(UserError) as error:
        restoring.restore(saved, state)
    lines = [" ".join(line.split()) for line in str(error.value).splitlines()]
    assert "parameter in the model in the checkpoint" in lines
    assert "params/blocks/mlp/wi float32[2, 8, 32] float32[2, 8, 24]" in lines
    assert "params/head float32[8, 16] -" in lines
    assert "step float32[] int32[]" in lines
    assert "params/embedding - float32[16, 8]" in lines
    assert len(lines) == 7 and "assignment" in lines[-1].lower()


def test_a_part_that_the_state_lacks_is_not_missed(saved):
    state, _, _ = restoring.restore(saved, abstract(init_state(7)))  # the checkpoint has an average, the state none
    assert bits(state) == bits(init_state(7))


@pytest.mark.parametrize(
    "rules,message",
    [
        ([("params/embeding", None)], r"match no array of the model: 'params/embeding'.*mean 'params/embedding'"),
        ([("params/(", None)], "not a regular expression"),
        ([("params/embedding", "params/nowhere")], r"params/embedding +float32\[16, 8\] +-  \(params/nowhere\)"),
        ([("params/embedding", None)], "would be: params/embedding"),
    ],
)
def test_wrong_rules(saved, rules, message):
    with pytest.raises(UserError, match=message):
        restoring.restore_params(str(saved), abstract(init_state()["params"]), rules)


@pytest.mark.parametrize("directory", ["/dev/null/model", "/proc/model"])
def test_a_folder_that_cannot_be_written(directory):
    with pytest.raises(UserError, match=f"Cannot write to {directory}"):
        checkpoints.ensure_writable(directory)


def test_bad_settings(tmp_path):
    with pytest.raises(UserError, match="keep_last"):
        checkpoints.Checkpoints(tmp_path, keep_last=0)
    with pytest.raises(UserError, match="best_metric"):
        checkpoints.Checkpoints(tmp_path, keep_best=1)
    with pytest.raises(UserError, match="best_mode"):
        checkpoints.Checkpoints(tmp_path, keep_best=1, best_metric="bleu", best_mode="most")


@pytest.mark.parametrize("mode,best", [("max", 2), ("min", 3)])
def test_the_best_stay_by_metrics_that_come_after_the_save(tmp_path, mode, best):
    store = checkpoints.Checkpoints(tmp_path, keep_last=1, keep_best=1, best_metric="bleu", best_mode=mode)
    for step, score in {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.6}.items():
        store.save(step, {"x": jnp.full(2, step)}, {}, {"step": step, "metrics": {}, "evaluation_due": True})
        assert checkpoints.steps(tmp_path)[-1:] in ([step], [step - 1], [])  # it is written in the background
        store.add_evaluation(step, {"bleu": score})
        assert checkpoints.read_metadata(tmp_path) == {"step": step, "metrics": {"bleu": score}}
        assert not stored.faults(checkpoints.find_checkpoint(tmp_path))
    store.close()
    assert checkpoints.steps(tmp_path) == [best, 4]
    # Another process learns of them from the disk.
    store = checkpoints.Checkpoints(tmp_path, keep_last=1, keep_best=1, best_metric="bleu", best_mode=mode)
    store.save(5, {"x": jnp.zeros(2)}, {}, {"step": 5})
    store.close()
    assert checkpoints.steps(tmp_path) == [best, 5]


@pytest.mark.parametrize("what", ["renamed", "empty", "cut"])
def test_a_step_is_saved_where_something_else_has_its_name(tmp_path, what, caplog):
    store = checkpoints.Checkpoints(tmp_path, keep_last=9)
    store.save(5, {"x": jnp.full(2, 5)}, {}, {"step": 5})
    store.wait()
    there = tmp_path / "checkpoint_10"
    if what == "empty":
        there.mkdir()
    else:
        shutil.copytree(tmp_path / "checkpoint_5", there)
    if what == "cut":
        (there / "state" / "_METADATA").unlink()
    store.save(10, {"x": jnp.full(2, 10)}, {}, {"step": 10})
    store.close()
    assert "checkpoint_10 is broken: renamed to broken_checkpoint_10" in caplog.text
    restored, _, metadata = restoring.restore(there, abstract({"x": jnp.zeros(2, int)}))
    assert metadata == {"step": 10} and restored["x"].tolist() == [10, 10]
    assert checkpoints.steps(tmp_path) == [5, 10]
