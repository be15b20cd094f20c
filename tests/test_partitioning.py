"""Meshes: what is refused, where things lie, and that eight devices compute what one does."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from diffusion_t5x import partitioning
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.partitioning import MESH_AXES, MeshConfig
from diffusion_t5x.training.state import abstract_state


def abstract_mesh(data, fsdp, tensor, sequence=1):
    return AbstractMesh((1, data, fsdp, 1, sequence, tensor), MESH_AXES)


def test_the_data_axis_takes_what_is_left():
    assert dict(MeshConfig().make().shape) == dict.fromkeys(MESH_AXES, 1)


@pytest.mark.parametrize(
    "config,message",
    [
        (MeshConfig(fsdp=3), "1 × 2 × 3 × 1 × 1 × 1 does not match 8 devices"),
        (MeshConfig(data=4), "1 × 4 × 1 × 1 × 1 × 1 does not match 8 devices"),
        (MeshConfig(fsdp=16), "1 × 1 × 16 × 1 × 1 × 1 does not match 8 devices"),
        (MeshConfig(fsdp=0), "at least 1"),
        (MeshConfig(data=-8, fsdp=-1), "at least 1"),
        (MeshConfig(rules={"embeds": ("fsdp",)}), "no logical axis 'embeds'. Did you mean"),
        (MeshConfig(rules={"embed": ("fspd",)}), "must be a tuple of mesh axes"),
        (MeshConfig(rules={"embed": "fsdp"}), "must be a tuple of mesh axes"),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        config.make(devices=jax.devices() * 8)


@pytest.mark.parametrize(
    "mesh,axis",
    [(abstract_mesh(1, 5, 1), "'embed' of size 16 .* 5 .*fsdp"), (abstract_mesh(1, 1, 3), "'kv_heads' of size 2 .* 3")],
)
def test_a_parameter_that_does_not_divide_is_named(mesh, axis):
    definition = ModelDefinition(tiny.LLAMA, tiny.VOCABULARY)
    with pytest.raises(UserError, match=r"blocks/attention/key of shape \(2, 16, 2, 4\): its axis " + axis):
        partitioning.param_shardings(mesh, definition.abstract(), definition.axes())


def test_rows_that_do_not_divide_are_refused():
    mesh = abstract_mesh(2, 2, 2)
    partitioning.check_batch(mesh, 12, 7)
    with pytest.raises(UserError, match="6 rows does not divide over 4 devices"):
        partitioning.check_batch(mesh, 6, 8)
    with pytest.raises(UserError, match=r"7 positions does not divide over 2 devices .*sequence"):
        partitioning.check_batch(abstract_mesh(2, 2, 2, sequence=2), 12, 7)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip of a slice, as far as a mesh looks at one."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "chip"


def test_slices_are_replicas():
    chips = [Chip(n, n % 2) for n in range(8)]
    mesh = MeshConfig(replica=2, fsdp=4).make(devices=chips)
    assert [{chip.slice_index for chip in chips} for chips in mesh.devices.reshape(2, 4)] == [{0}, {1}]
    with pytest.raises(UserError, match=r"2 slices: set MeshConfig\.replica = 2, not 1"):
        MeshConfig(fsdp=4).make(devices=chips)


@dataclasses.dataclass(frozen=True)
class TorusChip(Chip):
    """One that says where it is in its slice."""

    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def test_a_slice_that_cannot_be_cut_so_is_refused():
    places = enumerate(np.ndindex(4, 4, 4))
    chips = [TorusChip(n, 0, platform="tpu", device_kind="TPU v5", coords=place) for n, place in places]
    assert MeshConfig(fsdp=4, expert=16).make(devices=chips).shape["expert"] == 16
    with pytest.raises(UserError, match=r"cannot be cut into 8 fsdp × 8 expert: every axis of MeshConfig must be"):
        MeshConfig(fsdp=8, expert=8).make(devices=chips)


def specs(tree):
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def test_moments_lie_as_their_parameters_do_and_the_rest_stands_whole():
    mesh = abstract_mesh(2, 2, 2)
    definition = ModelDefinition(tiny.RELATIVE, tiny.VOCABULARY)
    state = abstract_state(mesh, definition, optax.adamw(1e-3), keep_ema=True)
    assert specs(state.params)["decoder"]["blocks"]["attention"] == {
        "query": P((), ("fsdp",), ("tensor",), ()),
        "key": P((), ("fsdp",), ("tensor",), ()),
        "value": P((), ("fsdp",), ("tensor",), ()),
        "out": P((), ("tensor",), (), ("fsdp",)),
    }
    assert specs(state.params)["embedding"] == P(("tensor",), ("fsdp",))
    moments = state.opt_state[0]
    assert specs(moments.mu) == specs(moments.nu) == specs(state.ema) == specs(state.params)
    assert moments.count.sharding.spec == state.step.sharding.spec == P()

    # Factored moments have shapes of their own.
    factored = abstract_state(mesh, definition, optax.adafactor(1e-3, min_dim_size_to_factor=8), keep_ema=False)
    moments = factored.opt_state[0]
    assert moments.v_row["embedding"].shape == (16,) and moments.v["decoder"]["blocks"]["attention_norm"][
        "scale"
    ].shape == (2, 16)
    assert set(
        map(str, jax.tree.leaves(specs((moments.v_row, moments.v_col)), is_leaf=lambda x: isinstance(x, P)))
    ) == {str(P())}
    assert specs(moments.v)["decoder"]["blocks"]["attention_norm"]["scale"] == P((), ("fsdp",))


def with_rules(rules, *sizes):
    """An abstract mesh of these sizes whose rules are other ones."""
    made = MeshConfig(rules=rules).make()
    sizes = (*abstract_mesh(*sizes).shape.values(), *[1] * (len(made.axis_names) - len(MESH_AXES)))
    return AbstractMesh(sizes, made.axis_names)


def test_rules_can_be_overridden():
    definition = ModelDefinition(tiny.RELATIVE, tiny.VOCABULARY)
    other = with_rules({"embed": ("fsdp", "sequence"), "vocab": ()}, 1, 2, 2, 2)
    shardings = partitioning.param_shardings(other, definition.abstract(), definition.axes())
    assert shardings["embedding"].spec == P((), ("fsdp", "sequence"))
    assert shardings["decoder"]["blocks"]["mlp"]["wo"].spec == P((), ("tensor",), ("fsdp", "sequence"))


def test_each_mesh_has_its_own_rules():
    plain, other = MeshConfig().make(), MeshConfig(rules={"batch": ("data",), "embed": ()}).make()
    assert partitioning.rules_of(plain) == partitioning.LOGICAL_AXIS_RULES and plain != other
    assert partitioning.rules_of(other) == partitioning.LOGICAL_AXIS_RULES | {"batch": ("data",), "embed": ()}
    assert partitioning.batch_sharding(plain).spec == P(("replica", "data", "fsdp", "expert"))
    assert partitioning.batch_sharding(other).spec == P(("data",))
    with jax.set_mesh(other):
        x = jax.jit(lambda: partitioning.constrain(jnp.zeros((2, 3)), ("batch", "embed")))()
    assert x.sharding.mesh == other


def test_two_axes_of_a_parameter_over_the_same_devices_are_refused():
    other = with_rules({"mlp": ("tensor", "fsdp")}, 1, 2, 2)
    definition = ModelDefinition(tiny.RELATIVE, tiny.VOCABULARY)
    with pytest.raises(UserError, match=r"mlp/wi_0 of shape .*: its axes 'embed' and 'mlp' cannot both .* axis fsdp"):
        partitioning.param_shardings(other, definition.abstract(), definition.axes())


def test_nothing_is_held_where_no_mesh_is_in_use():
    x = jnp.zeros((2, 3))
    assert partitioning.constrain(x, ("batch", "embed")) is x


@pytest.fixture(scope="module")
def on_meshes(eight_devices):
    """Findings of `on_meshes.py` by mesh: one device, and eight in three ways."""
    program = pathlib.Path(__file__).parent / "helpers" / "on_meshes.py"
    done = subprocess.run([sys.executable, program], env=eight_devices, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


EIGHT = [
    ("data", "Sundae"),
    ("data_fsdp", "Sundae"),
    ("data_fsdp", "Autoregressive"),
    ("fsdp_sequence_tensor", "Autoregressive"),
]


@pytest.mark.parametrize("mesh,objective", EIGHT)
@pytest.mark.slow
def test_losses_and_outputs_are_those_of_one_device(on_meshes, mesh, objective):
    one, eight = (on_meshes[name][objective] for name in ("one", mesh))
    assert len(one["losses"]) == 4 and one["losses"][-1] < 0.95 * one["losses"][0]
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    assert eight["tokens"] == one["tokens"] and len(np.unique(one["tokens"])) > 5
    np.testing.assert_allclose(eight["scores"], one["scores"], rtol=1e-4)  # after four steps of Adam


@pytest.mark.slow
def test_students_write_and_learn_the_same_on_eight_devices(on_meshes):
    one, eight = (on_meshes[name]["Distillation"] for name in ("one", "data_fsdp"))
    assert eight["tokens"] == one["tokens"] and one["tokens"][0] != one["tokens"][1]
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)


SHARDS = {  # what a device holds of embedding [32, 16], wi_0 [2, 16, 32], out [2, 4, 4, 16], activations [8, 4, 16]
    "one": ([32, 16], [2, 16, 32], [2, 4, 4, 16], [8, 4, 16]),
    "data": ([32, 16], [2, 16, 32], [2, 4, 4, 16], [1, 4, 16]),
    "data_fsdp": ([32, 4], [2, 4, 32], [2, 4, 4, 4], [1, 4, 16]),
    "fsdp_sequence_tensor": ([16, 8], [2, 8, 16], [2, 2, 4, 8], [4, 2, 16]),
}


@pytest.mark.parametrize("mesh", SHARDS)
@pytest.mark.slow
def test_devices_hold_their_part_and_no_more(on_meshes, mesh):
    *parameters, activation = SHARDS[mesh]
    trees = dict(on_meshes[mesh]["shards"])
    batch, held_activation = trees.pop("batch"), trees.pop("activation")
    assert {"parameters", "first moments", "second moments"} <= trees.keys()
    for tree, held in trees.items():
        assert held == parameters, tree
    assert batch == activation[0] and held_activation == activation


@pytest.mark.slow
def test_fresh_parameters_are_the_same_on_a_mesh_that_cuts_them(on_meshes):
    cut = on_meshes["fsdp_sequence_tensor"]
    assert "fresh parameters" in cut["shards"]
    np.testing.assert_allclose(cut["fresh"], on_meshes["one"]["fresh"], rtol=1e-6)


@pytest.mark.slow
def test_fsdp_holds_an_eighth_and_gathers_nothing_but_parameters(on_meshes):
    found = on_meshes["fsdp"]
    assert found["device"] == pytest.approx(found["all"] / 8, rel=0.05)
    gathered = re.findall(r"= \S*\[([\d,]*)\]\S* (all-gather|all-to-all)(?:-start)?\(", found["program"])
    assert {kind for _, kind in gathered} == {"all-gather"}
    # Whole parameters of a layer, norms and the embedding; activations would have 8 rows, or 80 positions.
    assert {shape for shape, _ in gathered} <= {"16", "16,8", "16,16", "16,32", "32,16"}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("decoder_only", marks=pytest.mark.slow),
        pytest.param("encoder_decoder", marks=pytest.mark.slow),
        pytest.param("experts", marks=pytest.mark.long),
        pytest.param("gpt2", marks=pytest.mark.long),
    ],
)
def test_every_objective_trains_and_decodes_the_same_on_every_mesh(eight_devices, model):
    program = pathlib.Path(__file__).parent / "helpers" / "mesh_matrix.py"
    command = [sys.executable, program, model]
    done = subprocess.run(command, env=eight_devices, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert len(seen) == 4
    for objective, on_mesh in seen.items():
        one = on_mesh.pop("one")
        losses = one["losses"]  # a single one is noisy: its weights are 1 / t
        assert len(on_mesh) == 4 and len(losses) == 20 and np.mean(losses[-5:]) < np.mean(losses[:5]), objective
        assert len(np.unique(one["tokens"])) > 5, objective
        for mesh, found in on_mesh.items():
            where = f"{objective} on {mesh}"
            np.testing.assert_allclose(found["losses"][:10], losses[:10], rtol=1e-5, err_msg=where)
            # Training amplifies rounding: the masked loss, whose weights are 1 / t, by some 3e-5 in 20 steps.
            np.testing.assert_allclose(found["losses"], losses, rtol=1e-4, err_msg=where)
            assert found["gradients"] < 1e-5, (objective, mesh)
            assert found["tokens"] == one["tokens"], (objective, mesh)  # no ties by rounding among these


def test_64_bits_are_refused_in_one_line():
    with jax.enable_x64(True), pytest.raises(UserError, match=r"64 bits \(JAX_ENABLE_X64\).*jax_enable_x64"):
        MeshConfig().make()
