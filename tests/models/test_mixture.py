"""A mixture of experts: against plain loops, its choice by enumeration, its gradients, and how its use is measured."""

import dataclasses
import functools
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.experts import Experts
from diffusion_t5x.models.masks import CAUSAL, Slots
from diffusion_t5x.models.mixture import Mixture, balance, choose
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.masked import Masked

EMBED = 8
QWEN = Experts(number=6, per_token=2, mlp_dim=5)
LLADA = dataclasses.replace(QWEN, normalize=False)
LLADA2 = dataclasses.replace(tiny.EXPERTS.experts, dense_layers=0)
KINDS = {"qwen3": QWEN, "llada": LLADA, "llada2": LLADA2}


@functools.cache
def layer(experts):
    """A layer with weights of moderate size."""
    mixture = Mixture(jax.random.key(0), EMBED, experts, activation="silu")
    rng = np.random.default_rng(1)
    for name in ("router", "wi_0", "wi_1", "wo", *(["selection_bias"] if experts.selection_bias else [])):
        parameter = getattr(mixture, name)
        parameter.set_value(jnp.asarray(0.5 * rng.standard_normal(parameter.get_value().shape), jnp.float32))
    return mixture


def hidden(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*shape, EMBED)), jnp.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def plain_choice(experts, scores, bias):
    """One token's experts and factors, by trying every set of groups."""
    judged = scores + bias
    size = experts.number // experts.groups
    of_group = [sum(sorted(judged[g * size : (g + 1) * size])[-2:]) for g in range(experts.groups)]
    sets = itertools.combinations(range(experts.groups), experts.groups_per_token)
    groups = max(sets, key=lambda groups: sum(of_group[g] for g in groups))
    allowed = [e for e in range(experts.number) if e // size in groups]
    chosen = sorted(allowed, key=lambda e: -judged[e])[: experts.per_token]
    factors = scores[chosen] / (scores[chosen].sum() if experts.normalize else 1)
    return chosen, factors * experts.scale


def plain(mixture, x):
    """The layer in float64, token by token and expert by expert."""
    experts = mixture.experts
    router, wi_0, wi_1, wo = (
        np.asarray(getattr(mixture, name).get_value(), np.float64) for name in ("router", "wi_0", "wi_1", "wo")
    )
    bias = np.asarray(mixture.selection_bias.get_value(), np.float64) if experts.selection_bias else 0
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:-1]):
        token = np.asarray(x[place], np.float64)
        logits = token @ router
        scores = np.exp(logits) / np.exp(logits).sum() if experts.scores == "softmax" else 1 / (1 + np.exp(-logits))
        for expert, factor in zip(*plain_choice(experts, scores, bias), strict=True):
            out[place] += factor * (silu(token @ wi_0[expert]) * (token @ wi_1[expert])) @ wo[expert]
        if experts.shared_mlp_dim:
            gate, up, down = (np.asarray(getattr(mixture.shared, n).get_value()) for n in ("wi_0", "wi_1", "wo"))
            out[place] += (silu(token @ gate) * (token @ up)) @ down
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_read_by_its_experts_and_by_no_other(kind):
    mixture, x = layer(KINDS[kind]), hidden(3, 10)
    found, _ = jax.jit(lambda x: mixture(x, None, jnp.ones(x.shape[:2], bool)))(x)
    np.testing.assert_allclose(found, plain(mixture, x), rtol=0, atol=2e-5)


def test_groups_are_chosen_as_by_enumeration():
    experts = Experts(number=12, per_token=4, mlp_dim=1, groups=6, groups_per_token=3, scores="sigmoid", scale=0.5)
    rng = np.random.default_rng(2)
    scores, bias = rng.random((40, 5, 12)).astype(np.float32), rng.standard_normal(12).astype(np.float32)
    found = choose(experts, jnp.asarray(scores), jnp.asarray(bias))
    for place in np.ndindex(40, 5):
        chosen, factors = plain_choice(experts, scores[place], bias)
        np.testing.assert_array_equal(found[0][place], chosen)
        np.testing.assert_allclose(found[1][place], factors, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_every_expert_reading_every_token(kind):
    """The dense form: all experts read all tokens, and those that are not chosen have the factor 0."""
    experts, x = KINDS[kind], hidden(2, 9)
    names = ("router", "wi_0", "wi_1", "wo")
    values = {name: getattr(layer(experts), name).get_value() for name in names} | {"x": x}
    toward = hidden(2, 9, seed=3)

    def sparse(values):
        mixture = Mixture(jax.random.key(0), EMBED, dataclasses.replace(experts, shared_mlp_dim=0), activation="silu")
        for name in names:
            getattr(mixture, name).set_value(values[name])
        return jnp.sum(mixture(values["x"], None, jnp.ones((2, 9), bool))[0] * toward)

    def dense(values):
        logits = values["x"] @ values["router"]
        scores = jax.nn.softmax(logits) if experts.scores == "softmax" else jax.nn.sigmoid(logits)
        chosen, _ = choose(experts, scores, jnp.zeros(experts.number))
        kept = scores * jax.nn.one_hot(chosen, experts.number).sum(axis=-2)
        kept = kept / kept.sum(axis=-1, keepdims=True) if experts.normalize else kept
        inner = jax.nn.silu(jnp.einsum("bld,edm->blem", values["x"], values["wi_0"]))
        inner = inner * jnp.einsum("bld,edm->blem", values["x"], values["wi_1"])
        return jnp.sum(jnp.einsum("blem,emd,ble->bld", inner, values["wo"], kept * experts.scale) * toward)

    found, expected = (jax.jit(jax.grad(function))(values) for function in (sparse, dense))
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0.01
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_to_the_bit_alone_and_in_a_batch(kind):
    mixture, x = layer(KINDS[kind]), hidden(4, 16)
    run = jax.jit(lambda x: mixture(x, None, jnp.ones(x.shape[:2], bool))[0])
    alone = np.concatenate([run(row[None]) for row in x])
    np.testing.assert_array_equal(run(x), alone)


def test_an_even_load_costs_one_and_one_expert_for_all_costs_their_number():
    counted = jnp.ones((2, 12), bool)
    even = jnp.full((2, 12, 6), 1 / 6)
    in_turn = (jnp.arange(24).reshape(2, 12, 1) * 2 + jnp.arange(2)) % 6
    found = balance(QWEN, even, in_turn, counted)
    assert {name: float(loss.ratio.mean()) for name, loss in found.items()} == pytest.approx(
        {"balance": 1.0, "busiest_expert": 1.0, "idle_experts": 0.0}
    )
    one = dataclasses.replace(QWEN, per_token=1, balance_weight=0.25)
    all_to_one = jax.nn.one_hot(jnp.full((2, 12), 4), 6)
    found = balance(one, all_to_one, jnp.full((2, 12, 1), 4), counted)
    assert {name: float(loss.ratio.mean()) for name, loss in found.items()} == pytest.approx(
        {"balance": 6.0, "busiest_expert": 6.0, "idle_experts": 5 / 6}
    )
    assert [loss.weight for loss in found.values()] == [0.25, 0, 0]


@pytest.mark.parametrize("kind", ["qwen3", "llada2"])
def test_the_balance_loss_is_that_of_its_paper_over_counted_slots(kind):
    """DeepSeek-V3's equations 17 to 20 in loops. Slots that do not count change nothing, whatever they hold."""
    mixture, x = layer(KINDS[kind]), hidden(3, 8)
    counted = np.array([[0] * 2 + [1] * 6, [1] * 3 + [0] * 5, [0] * 8], bool)
    measure = jax.jit(lambda x: mixture(x, None, jnp.asarray(counted))[1])
    scores = np.asarray(mixture.scores(x), np.float64)
    bias = np.asarray(mixture.selection_bias.get_value()) if mixture.experts.selection_bias else 0
    total, uses = 0.0, np.zeros(mixture.experts.number)
    for row, there in enumerate(counted):
        for expert in range(mixture.experts.number):
            f = p = 0.0
            for s in scores[row][there]:
                chosen = expert in plain_choice(mixture.experts, s, bias)[0]
                uses[expert] += chosen
                f += chosen * mixture.experts.number / (mixture.experts.per_token * there.sum())
                p += s[expert] / s.sum() / there.sum()
            total += there.sum() * f * p
    found = measure(x)
    assert float(found["balance"].ratio.mean()) == pytest.approx(total / counted.sum(), rel=1e-5)
    assert float(found["busiest_expert"].ratio.mean()) == pytest.approx(uses.max() / uses.mean(), rel=1e-5)
    other = measure(jnp.where(counted[..., None], x, 3 - x))
    for name, loss in found.items():
        assert float(loss.ratio.numerator) == pytest.approx(float(other[name].ratio.numerator), rel=1e-6)


@pytest.mark.parametrize(
    "objective", [pytest.param(Masked(), marks=pytest.mark.slow), Block(4)], ids=["masked", "block"]
)
def test_targets_count_in_every_layer_with_experts(objective):
    """And block diffusion counts them in both halves."""
    definition, params = tiny.make_model(tiny.EXPERTS)
    batch = tiny.pack([tiny.random_examples(0, [(5, 8), (3, 9)]), tiny.random_examples(1, [(4, 6)])], 28)

    def losses(params):
        sums = objective.loss(definition.bind(params), batch, jax.random.key(0), train=False)
        return sums.total(), sums

    (total, sums), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
    halves = 2 if isinstance(objective, Block) else 1
    assert sums.auxiliary["balance"].ratio.denominator == 2 * halves * batch.target_mask.sum()
    assert sums.auxiliary["busiest_expert"].ratio.denominator == 2
    expected = float(sums.loss.mean() + 0.5 * sums.auxiliary["balance"].ratio.mean())
    assert float(total) == pytest.approx(expected, rel=1e-6)
    for stack, parts in {"dense_blocks": {"wi_0", "wo"}, "blocks": {"router", "wi_0", "wo"}}.items():
        assert all(np.abs(gradients["decoder"][stack]["mlp"][part]).max(axis=(1, 2)).min() > 0 for part in parts)
    assert not gradients["decoder"]["blocks"]["mlp"]["selection_bias"].any()  # nothing but the choice depends on it


def test_first_layers_may_have_no_experts():
    """Two stacks, one after the other, over whole rows and over a cache."""
    definition, params = tiny.make_model(tiny.EXPERTS)
    assert params["decoder"]["dense_blocks"]["mlp"]["wi_0"].shape == (1, 16, 32)
    assert params["decoder"]["blocks"]["mlp"]["wi_0"].shape == (2, 8, 16, 5)
    batch = tiny.one_a_row(tiny.random_examples(0, [(5, 7), (4, 8)]), 12)
    slots = jax.tree.map(jnp.asarray, Slots.of(batch))

    @jax.jit
    def both_ways(params):
        model = definition.bind(params)
        cache, parts = KVCache.empty(definition.config, slots), []
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            place = jnp.full(2, start)
            part, cache = model.extend(jnp.asarray(batch.tokens)[:, start:stop], CAUSAL, cache, place)
            parts.append(part)
        return model(batch.tokens, slots, CAUSAL).hidden, jnp.concatenate(parts, axis=1)

    whole, in_parts = both_ways(params)
    np.testing.assert_allclose(in_parts, whole, rtol=0, atol=2e-5)


def test_the_router_stays_in_float32():
    definition, params = tiny.make_model(dataclasses.replace(tiny.EXPERTS, dtype="bfloat16"))
    read = definition.as_read(params)["decoder"]["blocks"]["mlp"]
    assert {name: read[name].dtype.name for name in ("router", "selection_bias", "wi_0")} == {
        "router": "float32",
        "selection_bias": "float32",
        "wi_0": "bfloat16",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_token": 7}, "per_token = 7 is more than the 6 experts available to a token"),
        ({"groups": 3, "per_token": 3}, "per_token = 3 is more than the 2 experts"),
        ({"groups": 4}, "number = 6 must be a multiple of groups = 4"),
        ({"groups": 2, "groups_per_token": 3}, "groups_per_token = 3 at most groups"),
        ({"scores": "linear"}, "scores"),
        ({"mlp_dim": 0}, "mlp_dim must be at least 1"),
        ({"balance_weight": -1.0}, "balance_weight must be at least 0"),
        ({"bias_rate": 0.1}, "set Experts.selection_bias = True"),
        ({"capacity_factor": 0.0}, "capacity_factor must be above 0, or None"),
    ],
)
def test_settings_that_fit_no_mixture_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(QWEN, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "encoder_decoder"}, 'experts need architecture = "decoder_only"'),
        ({"gated": False}, "gated = True"),
        ({"num_layers": 1}, "dense_layers = 1 must be below ModelConfig.num_layers = 1"),
        ({"rotary_dim": 6}, "rotary_dim must be even, above 0 and at most head_dim = 4; not 6"),
    ],
)
def test_models_that_can_have_no_mixture_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(tiny.EXPERTS, **changes)


@pytest.fixture(scope="module")
def on_meshes(eight_devices):
    """Findings of `experts_on_meshes.py`."""
    program = pathlib.Path(__file__).parents[1] / "helpers" / "experts_on_meshes.py"
    done = subprocess.run([sys.executable, str(program)], env=eight_devices, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(on_meshes):
    """Rows, positions and experts are spread: the same losses, use of experts and gradients."""
    seen = dict(on_meshes["runs"])
    one = seen.pop("one")
    assert one["held"] == [2, 8, 16, 5]
    assert {"loss", "balance", "busiest_expert", "idle_experts"} <= one["metrics"][0].keys()
    for name, found in seen.items():
        held = {"expert": 2, "expert_tensor": 2}.get(name, 4)
        assert found["held"][1] == held, name  # of the experts
        assert found["gradients"] < 1e-5, name
        assert found["biases"] == one["biases"], name
        for mine, theirs in zip(found["metrics"], one["metrics"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5), name


@pytest.mark.slow
def test_choices_beyond_the_bound_are_dropped_and_counted(on_meshes):
    """Those with the smallest factors; a token whose every choice is dropped keeps its residual as it is."""
    seen = on_meshes["bounded"]
    assert 0.3 < seen["lost"][0] < 0.9 and seen["lost"][0] != seen["lost"][1]
    assert seen["dropped"] == pytest.approx(seen["lost"])
    assert seen["apart"] < 1e-5 * seen["largest"]
    assert seen["untouched"][0] == seen["untouched"][1] > 0
