"""Drafts against passes over texts whose ends are masked, and training that leaves the model as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from variants import quick

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.drafts import DraftingDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.low_rank import LowRank
from diffusion_t5x.models.masks import CAUSAL
from diffusion_t5x.models.reading import shift_right, shifted_slots
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.distillation import divergence
from diffusion_t5x.objectives.drafts import Drafts
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.lora import Lora, LoraDefinition, check_drafts
from diffusion_t5x.training.state import TrainState, abstract_state, split
from diffusion_t5x.training.step import make_train_step

CONFIGS = {
    "relative": tiny.RELATIVE,
    "llama": tiny.LLAMA,
    "encoder_decoder": tiny.ENCODER_DECODER,
    "no start token": dataclasses.replace(tiny.LLAMA, reads_start=False),
}
LORA = Lora(4, drafts_only=True)
MASK = tiny.VOCABULARY.mask_id


def is_low_rank(leaf):
    return isinstance(leaf, LowRank)


@functools.cache
def make_model(name):
    """The plain model, the one with random updates for drafts, and the plain one with these updates everywhere."""
    plain, params = tiny.make_model(CONFIGS[name])
    definition = LoraDefinition(CONFIGS[name], tiny.VOCABULARY, LORA)
    adapted = jax.tree.map(
        lambda leaf: (
            leaf.replace(up=0.5 * jax.random.normal(jax.random.key(1), leaf.up.shape)) if is_low_rank(leaf) else leaf
        ),
        definition.adapt(params, jax.random.key(0)),
        is_leaf=is_low_rank,
    )
    everywhere = jax.tree.map(lambda leaf: leaf.merged() if is_low_rank(leaf) else leaf, adapted, is_leaf=is_low_rank)
    return plain, params, definition, adapted, everywhere


def make_batch(name):
    examples = tiny.random_examples(3, [(4, 7), (0, 9), (5, 2), (1, 8)])
    if name == "encoder_decoder":
        return tiny.pack_apart([[example] for example in examples], 5, 9)
    return tiny.one_a_row(examples, 11)


@functools.partial(jax.jit, static_argnums=(0, 3))  # compiled once for each number of masks
def draft_by_hand(name, one, first, num_masks):
    """Logits of the last of so many drafts after the first token of a block, which is at `first` of the only row.

    The plain model reads the text up to there into a cache, and nonsense behind it; the one whose updates are
    everywhere reads MASKs over it.
    """
    plain, params, _, _, everywhere = make_model(name)
    tokens = shift_right(one.tokens, one.positions, tiny.VOCABULARY.start_id)
    tokens = jnp.where(jnp.arange(tokens.shape[1]) <= first, tokens, 5)
    model, drafting = plain.bind(params), plain.bind(everywhere)
    encoded = model.encode(one)
    cache = KVCache.empty(plain.config, shifted_slots(one, model.vocabulary))
    _, cache = model.extend(tokens, CAUSAL, cache, jnp.array([0]), encoded)
    hidden, _ = drafting.extend(jnp.full((1, num_masks), MASK), CAUSAL, cache, first[None] + 1, encoded)
    return drafting.logits(hidden)[0, -1]


@functools.partial(jax.jit, static_argnums=0)
def plain_logits(name, batch):
    plain, params, *_ = make_model(name)
    model = plain.bind(params)
    return model.logits(Autoregressive().output(model, batch).hidden)


@pytest.mark.parametrize("name", quick(["relative", "llama", "no start token"], ["relative"]))
def test_a_draft_reads_the_text_before_its_block_and_the_drafts_before_it(name):
    _, _, definition, adapted, _ = make_model(name)
    batch, objective = make_batch(name), Drafts(3)
    sums = jax.jit(lambda params: objective.loss(definition.bind(params), batch, jax.random.key(0)))(adapted)
    plain = plain_logits(name, batch)
    distances, agreeing, blocks, accepted = [], [], 0, 0
    for row, mask in enumerate(batch.target_mask):
        targets, one = np.flatnonzero(mask), tiny.rows_of(batch, [row])
        for first in targets[::3]:
            blocks += 1
            right = True
            for place in range(first + 1, min(first + 3, targets[-1] + 1)):
                by_hand = draft_by_hand(name, one, jnp.asarray(first), int(place - first))
                drafted, target = (forbid(x, tiny.VOCABULARY) for x in (by_hand, plain[row, place]))
                distances.append(divergence(target, drafted))
                agreeing.append(jnp.argmax(drafted) == jnp.argmax(target))
                right &= bool(agreeing[-1])
                accepted += right
    assert int(sums.loss.denominator) == len(distances)
    np.testing.assert_allclose(sums.loss.mean(), np.mean(distances), rtol=1e-4)
    np.testing.assert_allclose(sums.metrics["agreement"].mean(), np.mean(agreeing))
    np.testing.assert_allclose(sums.metrics["tokens_per_pass"].mean(), (blocks + accepted) / blocks)


@pytest.mark.parametrize("name", CONFIGS)
def test_token_by_token_the_model_is_what_it_was_bit_for_bit(name):
    plain, params, definition, adapted, everywhere = make_model(name)
    batch = make_batch(name)

    @jax.jit
    def likelihoods(params, adapted, everywhere):
        models = plain.bind(params), definition.bind(adapted), plain.bind(everywhere)
        return [Autoregressive().log_likelihood(model, batch, None, 2).log_likelihood for model in models]

    before, after, merged = likelihoods(params, adapted, everywhere)
    np.testing.assert_array_equal(before, after)
    assert (np.abs(merged - before) > 0.01).all()


@pytest.mark.slow
def test_training_drafts_saves_passes_and_changes_no_text():
    """An overfitted draft of one text is accepted; the text is the start's own."""
    config = tiny.LLAMA
    mesh, optimizer = MeshConfig().make(jax.devices()[:1]), optax.adam(1e-2)
    definition = LoraDefinition(config, tiny.VOCABULARY, LORA)
    plain, params = tiny.make_model(config)
    prompts = tiny.one_a_row([(inputs, [0] * 12) for inputs, _ in tiny.random_examples(5, [(4, 0)] * 4)])
    key = jax.random.key(0)
    greedy = jax.jit(lambda params: AutoregressiveDecoder().decode(plain.bind(params), prompts, key))(params)
    texts = prompts.replace(tokens=greedy.tokens)

    abstract = abstract_state(mesh, definition, optimizer, False)
    adapted = definition.adapt(params, key)
    state = TrainState(jnp.int32(0), adapted, optimizer.init(split(definition, adapted)[0]))
    state = jax.tree.map(lambda x, at: jax.device_put(jnp.copy(x), at.sharding), state, abstract)
    step = make_train_step(mesh, abstract, definition, Drafts(4), optimizer, seed=0)
    before = jax.tree.map(np.asarray, definition.bind(state.params).embedding.get_value())
    with jax.set_mesh(mesh):
        first = None
        for _ in range(150):
            state, metrics = step(state, texts)
            first = first or jax.device_get(metrics)
    assert metrics["loss"] < 0.2 * first["loss"] and metrics["tokens_per_pass"] > first["tokens_per_pass"]
    drafting = jax.jit(lambda params: DraftingDecoder(4).decode(definition.bind(params), prompts, key))
    found = drafting(state.params)
    np.testing.assert_array_equal(found.tokens, greedy.tokens)
    np.testing.assert_array_equal(before, definition.bind(state.params).embedding.get_value())
    assert found.row_steps.sum() < 0.6 * greedy.row_steps.sum()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        Drafts(1)
    with pytest.raises(UserError, match="LORA_WHOLE"):
        Lora(drafts_only=True, whole=["embedding"])
    with pytest.raises(UserError, match="LORA_DRAFTS_ONLY=True"):
        check_drafts(Lora(), Drafts())
    with pytest.raises(UserError, match="LORA_DRAFTS_ONLY=True"):
        check_drafts(None, Drafts())
    with pytest.raises(UserError, match=r"objectives/drafts\.gin"):
        check_drafts(LORA, Autoregressive())
    check_drafts(LORA, Drafts())
    check_drafts(Lora(), Autoregressive())


def test_settings_of_plain_lora_are_described_as_before():
    assert "drafts_only" not in Lora().describe() and LORA.describe()["drafts_only"] is True
