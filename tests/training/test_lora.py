"""LoRA: closed forms, what is trained and what is not, checkpoints and what reads them."""

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
from diffusion_t5x.evaluation.loading import load_model, load_start
from diffusion_t5x.models.layers import dense
from diffusion_t5x.models.low_rank import LowRank
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.autoregressive_policy_gradient import AutoregressivePolicyGradient
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.distillation import Teacher
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training import optimizers, step
from diffusion_t5x.training.agreement import Agreement
from diffusion_t5x.training.lora import Lora, LoraDefinition
from diffusion_t5x.training.state import TrainState, abstract_state, fresh_state, join, split
from diffusion_t5x.training.step import loss_and_gradients, make_train_step

BATCH = tiny.one_a_row(tiny.random_examples(0, [(n % 4, 6) for n in range(8)]), length=10)
APART = tiny.pack_apart([[example] for example in tiny.random_examples(0, [(3, 6)] * 4)], 4, 8)
SETTINGS = Lora(rank=3, alpha=6.0, whole=["embedding"])
FACTORS = "query", "key", "value", "out", "wi_0", "wi_1", "wo"


def make(config=tiny.LLAMA, settings=SETTINGS, trained=False):
    """A definition, parameters of the plain model, and the same with factors; `trained`: as they might be later."""
    definition = LoraDefinition(config, tiny.VOCABULARY, settings)
    plain = tiny.random_params(definition_of(config))
    params = definition.adapt(plain, jax.random.key(1))
    if trained:
        rng = np.random.default_rng(2)
        some, frozen = split(definition, params)
        params = join(jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), some), frozen)
    return definition, plain, params


def definition_of(config):
    return ModelDefinition(config, tiny.VOCABULARY)


def merged(params):
    """In numpy, in double precision, one layer and matrix at a time."""

    def one(leaf):
        if not isinstance(leaf, LowRank):
            return leaf
        base, down, up = (np.asarray(x, np.float64) for x in (leaf.base, leaf.down, leaf.up))
        layers = [b + 2.0 * (d @ u).reshape(b.shape) for b, d, u in zip(base, down, up, strict=True)]
        return np.stack(layers).astype(np.float32)

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, LowRank))


def assert_close(found, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), found, expected)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize(
    "inputs,outputs", [((6,), (5,)), ((6,), (2, 5)), ((2, 3), (4,))], ids=["plain", "heads out", "heads in"]
)
def test_a_product_and_the_merged_matrix_are_the_closed_form(inputs, outputs):
    rng = np.random.default_rng(0)
    flat_in, flat_out = int(np.prod(inputs)), int(np.prod(outputs))
    shapes = (*inputs, *outputs), (flat_in, 2), (2, flat_out), (3, 7, *inputs)
    base, down, up, x = (rng.standard_normal(shape, np.float32) for shape in shapes)
    low_rank = LowRank(base, down, up, scale=0.5)
    whole = base.reshape(flat_in, flat_out) + 0.5 * down @ up
    np.testing.assert_allclose(low_rank.merged(), whole.reshape(base.shape), rtol=1e-5, atol=1e-6)
    found = dense(jnp.asarray(x), low_rank, inputs=len(inputs))
    np.testing.assert_allclose(found, (x.reshape(21, -1) @ whole).reshape(3, 7, *outputs), rtol=1e-4, atol=1e-5)
    stacked = LowRank(*(np.stack([array, 2 * array]) for array in (base, down, up)), scale=0.5)
    second = 2 * base + 2 * (low_rank.merged() - base) * 2
    np.testing.assert_allclose(stacked.merged(), np.stack([low_rank.merged(), second]), rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_of(definition, objective, params, batch, **settings):
    return objective.loss(definition.bind(params), batch, jax.random.key(3), train=False, **settings)


@pytest.mark.parametrize(
    "config,objective,batch",
    [
        (tiny.LLAMA, Autoregressive(), BATCH),
        (tiny.LLAMA, Block(3), BATCH),
        pytest.param(tiny.ENCODER_DECODER, Sundae(), APART, marks=pytest.mark.slow),
        (tiny.GPT2, Autoregressive(), BATCH),
        pytest.param(tiny.EXPERTS, Autoregressive(), BATCH, marks=pytest.mark.slow),
    ],
    ids=["autoregressive", "block", "sundae encoder_decoder", "gpt2", "experts"],
)
def test_it_starts_as_the_base_and_goes_on_as_the_merged_model(config, objective, batch):
    definition, plain, params = make(config)
    base = definition_of(config)
    assert_same(loss_of(definition, objective, params, batch), loss_of(base, objective, plain, batch))
    definition, plain, params = make(config, trained=True)
    found = loss_of(definition, objective, params, batch)
    assert_close(found, loss_of(base, objective, merged(params), batch))
    assert abs(found.loss.mean() / loss_of(base, objective, plain, batch).loss.mean() - 1) > 1e-3


def test_gradients_are_those_of_the_merged_model_by_the_factors_and_of_nothing_else():
    """With W = base + s down up: dL/ddown = s (dL/dW) up^T, dL/dup = s down^T (dL/dW)."""
    definition, _, params = make(trained=True)
    gradients = jax.jit(
        lambda p, d: loss_and_gradients(d, Autoregressive().loss, p, BATCH, jax.random.key(0))[1], static_argnums=1
    )
    found, expected = gradients(params, definition), gradients(merged(params), definition_of(tiny.LLAMA))
    layers, whole = found["decoder"]["blocks"], expected["decoder"]["blocks"]
    for part, name in [("attention", name) for name in FACTORS[:4]] + [("mlp", name) for name in FACTORS[4:]]:
        low_rank, by, of = params["decoder"]["blocks"][part][name], whole[part][name], layers[part][name]
        assert of.base is None
        for layer in range(2):
            down, up = low_rank.down[layer], low_rank.up[layer]
            by_matrix = np.reshape(by[layer], (len(down), up.shape[1]))
            expected_factors = 2 * by_matrix @ up.T, 2 * down.T @ by_matrix
            assert_close((of.down[layer], of.up[layer]), expected_factors, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["embedding"], expected["embedding"], rtol=1e-3, atol=1e-4)
    trained = {name for name in named_leaves(found) if not name.startswith("decoder/blocks/")}
    assert trained == {"embedding"}
    assert not {name for name in named_leaves(found) if "norm" in name}


def steps(mesh):
    """Three steps of AdamW with an average: the state before and after each, their losses, and what made them."""
    definition, _, params = make()
    optimizer = optimizers.adamw(1e-2, max_grad_norm=1.0)
    with jax.set_mesh(mesh):
        abstract = abstract_state(mesh, definition, optimizer, keep_ema=True)
        trained, _ = split(definition, params)
        state = TrainState(jnp.int32(0), params, optimizer.init(trained), jax.tree.map(jnp.copy, trained))
        state = jax.tree.map(lambda x, at: jax.device_put(jnp.copy(x), at.sharding), state, abstract)
        step = make_train_step(mesh, abstract, definition, Autoregressive(), optimizer, seed=3, ema_decay=0.5)
        states, losses = [jax.device_get(state)], []
        for _ in range(3):
            state, metrics = step(state, partitioning.put_batch(mesh, BATCH))
            states.append(jax.device_get(state))
            losses.append(float(metrics["loss"]))
    moment = state.opt_state[1].mu["decoder"]["blocks"]["attention"]["query"]
    parts = [list(x.addressable_shards[0].data.shape) for x in (moment.down, moment.up)]
    found = {"states": states, "losses": losses, "parts": parts}
    return found | {"mesh": mesh, "step": step, "abstract": abstract, "definition": definition}


@pytest.fixture(scope="module")
def run():
    return steps(MeshConfig().make())


def test_a_step_changes_what_is_trained_and_leaves_the_rest_bit_for_bit(run):
    before, after = run["states"][0], run["states"][-1]
    frozen = [split(run["definition"], state.params)[1] for state in (before, after)]
    assert_same(*frozen)
    assert len(jax.tree.leaves(frozen[0])) == 7 + 5 + 1  # matrices, norms, head
    old, new = (named_leaves(split(run["definition"], state.params)[0]) for state in (before, after))
    assert old.keys() == new.keys() and len(new) == 2 * 7 + 1
    assert all((old[name] != new[name]).any() for name in new)
    # Each layer's factors are its own.
    down = before.params["decoder"]["blocks"]["attention"]["query"].down
    assert down.shape == (2, 16, 3) and (down[0] != down[1]).any()
    average = named_leaves(after.ema)
    assert average.keys() == new.keys() and all((average[name] != new[name]).any() for name in new)
    assert after.eval_params["head"] is after.params["head"]
    assert after.eval_params["embedding"] is after.ema["embedding"]


def test_only_what_is_trained_has_optimizer_state(run):
    trained, _ = split(run["definition"], run["abstract"].params)
    numbers = sum(x.size for x in jax.tree.leaves(trained))
    assert numbers == 2 * 3 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32)) + 32 * 16
    state = jax.tree.leaves(run["abstract"].opt_state)
    counts = [x for x in state if x.ndim == 0]
    assert sum(x.size * x.dtype.itemsize for x in state) == 2 * 4 * numbers + sum(x.dtype.itemsize for x in counts)


def test_adafactor_takes_factors_as_matrices():
    definition, _, params = make()
    optimizer = optimizers.adafactor(1e-2, min_dim_size_to_factor=2)
    trained, _ = split(definition, params)
    updates, state = jax.eval_shape(lambda x: optimizer.update(x, optimizer.init(x), x), trained)
    assert jax.tree.structure(updates) == jax.tree.structure(trained)
    moments = {x.shape for name, x in named_leaves(state).items() if "attention/out/down/" in name}
    assert {(2, 16), (2, 3)} <= moments  # of each layer's [heads * head_dim, rank]


def test_bfloat16_is_for_the_frozen_matrices():
    definition = LoraDefinition(tiny.LLAMA, tiny.VOCABULARY, Lora(rank=3, base_dtype="bfloat16"))
    dtypes = {name: leaf.dtype for name, leaf in named_leaves(definition.abstract()).items()}
    small = {name for name, dtype in dtypes.items() if dtype == jnp.bfloat16}
    assert {name.rpartition("/")[2] for name in small} == {"base", "embedding", "head"} and len(small) == 9
    assert set(dtypes.values()) == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    whole = LoraDefinition(tiny.LLAMA, tiny.VOCABULARY, Lora(whole=["embedding"], base_dtype="bfloat16"))
    assert whole.abstract()["embedding"].dtype == jnp.float32


def test_activations_in_bfloat16_do_not_notice_that_the_base_is():
    config = dataclasses.replace(tiny.LLAMA, dtype="bfloat16")
    losses = []
    for dtype in ("float32", "bfloat16"):
        definition, _, params = make(config, Lora(rank=3, base_dtype=dtype), trained=True)
        losses.append(loss_of(definition, Autoregressive(), params, BATCH))
    assert_same(*losses)


def save(folder, run, number=2):
    store = checkpoints.Checkpoints(str(folder), asynchronous=False)
    metadata = {"lora": SETTINGS.describe(), "vocabulary": tiny.VOCABULARY.describe()}
    store.save(number, run["states"][number], {}, metadata)
    store.close()
    return str(folder)


def test_a_restored_run_goes_on_bit_for_bit(run, tmp_path):
    path = save(tmp_path, run)
    told = check_start(path, tiny.VOCABULARY, run["abstract"], merge=False, resumes=True)
    assert "as in the checkpoint" in told and "unread" not in told
    state, _, metadata = restoring.restore(path, run["abstract"])
    assert_same(state, run["states"][2])
    with jax.set_mesh(run["mesh"]):
        state, _ = run["step"](state, partitioning.put_batch(run["mesh"], BATCH))
    assert_same(state, run["states"][3])
    trained = Agreement(path, Record.read(metadata, path), "")
    trained.check_resumed(tiny.RELATIVE, Masked(), SETTINGS)
    for other in (None, Lora(rank=3, alpha=5.0, whole=["embedding"])):
        with pytest.raises(
            UserError, match=r"was trained with train\.lora = .*continue with the former, or start another"
        ):
            trained.check_resumed(tiny.RELATIVE, Masked(), other)


@pytest.mark.slow
def test_every_other_reader_gets_the_merged_model(run, tmp_path):
    path = save(tmp_path, run)
    base, state = definition_of(tiny.LLAMA), run["states"][2]
    check_start(path, tiny.VOCABULARY, {"params": base.abstract()})
    raw, average = merged(state.params), merged(state.eval_params)
    assert_close(restoring.restore_params(path, base.abstract()), raw)
    assert_close(restoring.restore_params(path, base.abstract(), use_ema=True), average)
    for use_ema, expected in ((True, average), (False, raw)):
        shapes, read = restoring.open_params(path, use_ema)
        assert shapes == {name: leaf.shape for name, leaf in named_leaves(base.abstract()).items()}
        assert_close({name: read(name) for name in shapes}, named_leaves(expected))
    difference = raw["decoder"]["blocks"]["mlp"]["wo"] - state.params["decoder"]["blocks"]["mlp"]["wo"].base
    assert np.abs(difference).max() > 1e-3


def test_another_run_starts_from_the_merged_model(run, tmp_path):
    path = save(tmp_path, run)
    definition = LoraDefinition(tiny.LLAMA, tiny.VOCABULARY, Lora(rank=2, targets=["query", "wi_?2|wo"]))
    mesh, optimizer = MeshConfig().make(), optax.adam(1e-2)
    abstract = abstract_state(mesh, definition, optimizer, keep_ema=True)
    rules = definition.restore_rules([("step|opt_state/.*", None)])
    for pattern in ("params/(.*)", "params/.*/query", "params/.*/query/base"):
        with pytest.raises(UserError, match="matches params/decoder/blocks/attention/query, whose base LoRA reads"):
            definition.restore_rules([(pattern, "ema/x")])
    assert "come from params/" in check_start(path, tiny.VOCABULARY, abstract, rules)
    init = functools.partial(fresh_state, definition, optimizer, True, jax.random.key(0))
    state = restoring.restore_initial(path, abstract, rules, init)
    expected = merged(run["states"][2].params)["decoder"]["blocks"]
    found = state.params["decoder"]["blocks"]
    assert_close(found["mlp"]["wo"].base, expected["mlp"]["wo"])
    assert_close(found["mlp"]["wi_0"], expected["mlp"]["wi_0"])
    assert not found["mlp"]["wo"].up.any()
    assert_same(state.ema["decoder"]["blocks"]["mlp"]["wo"].down, found["mlp"]["wo"].down)
    deviation = np.std(found["mlp"]["wo"].down)
    assert deviation == pytest.approx(32**-0.5, rel=0.2)  # one over the root of its inputs


@pytest.mark.slow
def test_the_start_near_which_it_is_held_shares_its_base(run, tmp_path):
    """The divergence and the gradient are those of a whole copy; kept is only what is trained in full."""
    path, mesh = save(tmp_path, run), MeshConfig().make()
    definition = LoraDefinition(tiny.LLAMA, tiny.VOCABULARY, SETTINGS)
    copy = Teacher(*load_model(path, tiny.LLAMA, tiny.VOCABULARY, mesh, use_ema=False))
    start = load_start(path, definition, mesh)
    assert list(named_leaves(start.params)) == ["embedding"]
    some, frozen = split(definition, definition.adapt(copy.params, jax.random.key(1)))
    rng = np.random.default_rng(2)
    params = join(jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), some), frozen)
    batch = BATCH.replace(
        written_at=np.where(BATCH.target_mask, 0, -1),
        written_log_probability=np.zeros(BATCH.tokens.shape, np.float32),
        advantage=np.zeros(len(BATCH.tokens), np.float32),
    )

    def held(teacher):
        def run(own, params):
            loss = step.loss_of(AutoregressivePolicyGradient(kl_weight=1.0), teacher, own, params)
            return loss_and_gradients(definition, loss, params, batch, jax.random.key(0))

        return jax.jit(run)(teacher.params, params)

    (sums, found), (of_copy, expected) = held(start), held(copy)
    divergence = of_copy.metrics["kl_from_start"].mean()
    assert divergence > 0.01
    np.testing.assert_allclose(sums.metrics["kl_from_start"].mean(), divergence, atol=1e-6)
    assert_close(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"base_dtype": "bf16"}, "base_dtype must be .* not 'bf16'"),
        ({"targets": "query"}, r'targets must be a list of names, such as \["query"\]'),
        ({"targets": []}, "at least one matrix"),
        (
            {"targets": ["quary"]},
            "no parameter's name ends in 'quary'. Did you mean 'query'.*There are decoder/blocks/",
        ),
        ({"targets": ["cross_attention/query"]}, "Did you mean 'attention/query'"),
        ({"targets": ["q("]}, r"targets: 'q\(' is not a regular expression"),
        ({"targets": ["embedding"]}, "embedding: not a matrix of the layers. Lora.whole trains any parameter"),
        ({"targets": ["attention_norm/.*"]}, "attention_norm/scale: not a matrix of the layers"),
        ({"whole": ["embeding"]}, "Lora.whole: .*Did you mean 'embedding'"),
        ({"whole": ["mlp/.*"]}, "Both Lora.targets and Lora.whole match decoder/blocks/mlp/wi_0"),
    ],
)
def test_mistakes_are_answered(settings, message):
    with pytest.raises(UserError, match=message):
        LoraDefinition(tiny.LLAMA, tiny.VOCABULARY, Lora(**settings))


def test_drafts_by_experts_are_refused():
    with pytest.raises(UserError, match=r"drafts_only does not reach experts, but .* decoder/blocks/mlp/wi_0.*Set"):
        LoraDefinition(tiny.EXPERTS, tiny.VOCABULARY, Lora(drafts_only=True))
    LoraDefinition(tiny.EXPERTS, tiny.VOCABULARY, Lora(drafts_only=True, targets=["query", "out"]))


@pytest.mark.slow
def test_eight_examples_are_learnt_by_factors_alone():
    batch = tiny.one_a_row(tiny.random_examples(0, [(2 + n % 4, 6) for n in range(8)]))
    # At T5's scale the logits of an embedding that is random and stays so could not become large.
    definition, _, params = make(dataclasses.replace(tiny.RELATIVE, logits_scale=1.0), Lora(rank=8, alpha=8.0))
    optimizer, steps = optax.adam(optax.cosine_decay_schedule(2e-2, 400)), 400
    trained, frozen = split(definition, params)

    def step(carry, key):
        trained, opt_state = carry
        params = join(trained, frozen)
        sums, grads = loss_and_gradients(definition, Autoregressive().loss, params, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(trained, updates), opt_state), sums

    keys = jax.random.split(jax.random.key(0), steps)
    _, sums = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((trained, optimizer.init(trained)))
    accuracy = sums.metrics["accuracy"]
    losses = sums.loss.numerator / sums.loss.denominator
    assert losses[0] > 10 * losses[-10:].mean(), losses[::40]
    assert accuracy.numerator[-1] == accuracy.denominator[-1]


PROGRAM = """
import json, jax, test_lora
from diffusion_t5x.partitioning import MeshConfig
found = test_lora.steps(MeshConfig(data=1, fsdp=2).make(jax.devices()[:2]))
print(json.dumps({name: found[name] for name in ("losses", "parts")}))
"""


@pytest.mark.slow
def test_two_devices_that_cut_the_parameters_compute_what_one_does(run, eight_devices):
    folder = pathlib.Path(__file__).parent
    environment = eight_devices | {
        "PYTHONPATH": ":".join([str(folder), str(folder.parent / "helpers"), *filter(None, sys.path)])
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    np.testing.assert_allclose(found["losses"], run["losses"], rtol=1e-5)
    assert run["losses"][2] < run["losses"][0]
    assert (run["parts"], found["parts"]) == ([[2, 16, 3], [2, 3, 16]], [[2, 8, 3], [2, 3, 16]])
