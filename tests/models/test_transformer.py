"""The Transformer against a plain numpy one, and against itself by other ways."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import tiny
from tiny import GPT2, LLAMA, RELATIVE, ROTARY

from diffusion_t5x.errors import UserError
from diffusion_t5x.models import transformer
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.masks import BIDIRECTIONAL, CAUSAL, PREFIX, AttentionKind, Slots
from diffusion_t5x.models.transformer import ModelDefinition

CONFIGS = {"relative": RELATIVE, "rotary": ROTARY, "llama": LLAMA, "gpt2": GPT2}
BLOCKS = AttentionKind("block_causal", 2)
LENGTH = 14
PACKED = tiny.pack([tiny.random_examples(0, [(3, 4), (1, 4)])], LENGTH)  # two examples and two slots of padding


@functools.cache
def forward(config):
    """The jitted `(params, tokens, slots, kind) -> logits`."""
    definition = ModelDefinition(config, tiny.VOCABULARY)

    def logits(params, tokens, slots, kind):
        model = definition.bind(params)
        return model.logits(model(tokens, slots, kind).hidden)

    return jax.jit(logits, static_argnums=3)


@pytest.mark.parametrize("kind", [CAUSAL, PREFIX, BIDIRECTIONAL, BLOCKS], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["relative", "llama", "gpt2"])
def test_packed_rows_against_a_plain_transformer_and_who_influences_whom(name, kind):
    config = CONFIGS[name]
    _, params = tiny.make_model(config)
    # Row j holds another token in slot j; the last row is as it was.
    slots = jax.tree.map(lambda x: np.repeat(x, LENGTH + 1, axis=0), Slots.of(PACKED))
    tokens = np.repeat(PACKED.tokens, LENGTH + 1, axis=0)
    tokens[np.arange(LENGTH), np.arange(LENGTH)] = 21
    logits = np.asarray(forward(config)(params, tokens, slots, kind))
    sees = np.asarray(kind.mask(slots, slots))[0]

    for segment in (1, 2):
        where = np.flatnonzero(PACKED.segment_ids[0] == segment)
        expected = plain.transformer(config, params, tokens[-1, where], sees[np.ix_(where, where)])
        np.testing.assert_allclose(logits[-1, where], expected, rtol=1e-4, atol=2e-5)

    change = np.abs(logits[:-1] - logits[-1]).max(axis=-1).T  # [slot that reads, slot that was changed]
    real = PACKED.segment_ids[0] > 0
    assert (change[real][~sees[real]] <= 1e-6).all()
    assert (change[sees] > 1e-4).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_number_of_parameters(name):
    config = CONFIGS[name]
    definition, params = tiny.make_model(config)
    attention = config.embed_dim * config.head_dim * (2 * config.num_heads + 2 * config.kv_heads)
    norm = config.embed_dim * (2 if config.norm == "layer" else 1)
    norms = 2 * norm + (2 * config.head_dim if config.query_key_norm else 0)
    biases = config.head_dim * (config.num_heads + 2 * config.kv_heads) if config.qkv_bias else 0
    biases += 2 * config.embed_dim + config.mlp_dim * (2 if config.gated else 1) if config.output_bias else 0
    mlp = (3 if config.gated else 2) * config.embed_dim * config.mlp_dim
    blocks = config.num_layers * (attention + norms + biases + mlp)
    embeddings = config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2)
    tables = {"relative": config.relative_buckets * config.num_heads, "rotary": 0}
    positions = tables[config.position] if config.position in tables else config.max_length * config.embed_dim
    assert definition.num_params() == embeddings + blocks + norm + positions
    names = jax.tree.map(len, definition.axes(), is_leaf=lambda x: isinstance(x, tuple))
    assert names == jax.tree.map(lambda x: x.ndim, params)


@pytest.mark.parametrize(
    "embed,layers,published", [(768, 12, 124_439_808), (1024, 24, 354_823_168), (1600, 48, 1_557_611_200)]
)
def test_gpt2_has_as_many_parameters_as_published(embed, layers, published):
    """Those of `openai-community/gpt2`, `gpt2-medium` and `gpt2-xl`; here with a row for MASK more."""
    sizes = {"embed_dim": embed, "num_layers": layers, "num_heads": embed // 64, "head_dim": 64, "mlp_dim": 4 * embed}
    config = dataclasses.replace(GPT2, **sizes, vocab_size=50_258, max_length=1024)
    assert ModelDefinition(config, tiny.VOCABULARY).num_params() == published + embed


def assert_trees_close(found, expected, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), found, expected)


def loss_and_gradients(config, batch=PACKED):
    """Value and gradients of a mean over all slots, padding included."""
    definition, params = tiny.make_model(config)

    def loss(params):
        model = definition.bind(params)
        return jnp.mean(model.logits(model(batch.tokens, Slots.of(batch), CAUSAL).hidden) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def expected_loss_and_gradients():
    return loss_and_gradients(RELATIVE)


@pytest.mark.parametrize("changes", [{"scan_unroll": True}, {"remat": "dots"}, {"remat": "full"}], ids=str)
def test_unrolling_and_rematerialisation_change_nothing(expected_loss_and_gradients, changes):
    found = loss_and_gradients(dataclasses.replace(RELATIVE, **changes))
    assert_trees_close(found, expected_loss_and_gradients, rtol=1e-5, atol=1e-6)


def test_few_layers_are_unrolled_and_many_are_not():
    def unrolled(layers, setting):
        return dataclasses.replace(RELATIVE, num_layers=layers, scan_unroll=setting).layers_unrolled

    assert [unrolled(12, True), unrolled(13, True), unrolled(13, 4), unrolled(13, False)] == [12, 1, 4, 1]


def test_dropout_is_drawn_from_the_rows_keys_and_off_without():
    config = dataclasses.replace(RELATIVE, dropout_rate=0.2)
    definition, params = tiny.make_model(config)
    rows = np.repeat(PACKED.tokens, 3, axis=0), jax.tree.map(lambda x: np.repeat(x, 3, axis=0), Slots.of(PACKED))
    without = forward(RELATIVE)(params, *rows, CAUSAL)
    np.testing.assert_array_equal(forward(config)(params, *rows, CAUSAL), without)

    keys = jax.random.split(jax.random.key(0), 2)[np.array([0, 1, 0])]
    hidden = jax.jit(lambda params: definition.bind(params)(*rows, CAUSAL, dropout_keys=keys).hidden)(params)
    np.testing.assert_array_equal(hidden[0], hidden[2])
    assert np.abs(hidden[0] - hidden[1]).max() > 0.1


def test_gradients_are_finite_where_a_row_is_empty():
    loss, gradients = loss_and_gradients(LLAMA, jax.tree.map(np.zeros_like, PACKED))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, gradients)))


def test_grouped_heads_equal_repeated_ones():
    grouped = dataclasses.replace(RELATIVE, num_kv_heads=2)
    _, params = tiny.make_model(grouped)
    blocks = params["decoder"]["blocks"]
    attention = blocks["attention"]
    repeated = attention | {name: np.repeat(attention[name], 2, axis=2) for name in ("key", "value")}
    full = params | {"decoder": params["decoder"] | {"blocks": blocks | {"attention": repeated}}}
    rows = PACKED.tokens, Slots.of(PACKED), CAUSAL
    np.testing.assert_allclose(forward(grouped)(params, *rows), forward(RELATIVE)(full, *rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [CAUSAL, PREFIX], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["relative", "llama", "gpt2"])
def test_extending_a_cache_gives_the_logits_of_whole_rows(name, kind):
    definition, params = tiny.make_model(CONFIGS[name])
    batch = tiny.one_a_row(tiny.random_examples(1, [(5, 7), (3, 7)]), 12)
    slots = Slots.of(batch)

    @functools.partial(jax.jit, static_argnums=3)
    def extend(params, cache, start, size):
        model = definition.bind(params)
        tokens = jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, size))(batch.tokens, start)
        hidden, cache = model.extend(tokens, kind, cache, start)
        return model.logits(hidden), cache

    found, cache = extend(params, KVCache.empty(definition.config, slots), np.array([0, 0]), 12)
    # As a decoder does: the prompt's pass wrote rubbish beyond the inputs, and each row goes on from its own place.
    first = np.array([5, 3])
    later = jnp.arange(12) >= first[:, None]
    cache = cache.replace(keys=jnp.where(later[None, :, :, None, None], 7.0, cache.keys))
    found = np.array(found)
    for step in range(7):
        logits, cache = extend(params, cache, first + step, 1)
        found[[0, 1], first + step] = logits[:, 0]
    whole = np.asarray(forward(CONFIGS[name])(params, batch.tokens, slots, kind))
    real = batch.segment_ids > 0
    np.testing.assert_allclose(found[real], whole[real], rtol=1e-5, atol=1e-5)


def test_map_logits_in_pieces_equals_the_whole(monkeypatch):
    definition, params = tiny.make_model()
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 13, 16)).astype(np.float32)
    labels, weights = rng.integers(0, 32, (2, 13)), {"of loss": rng.standard_normal((2, 13)).astype(np.float32)}
    lengths = []

    def score(logits, labels, weights):
        lengths.append(logits.shape[1])
        picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return weights["of loss"] * picked**2, {"best": jnp.argmax(logits, axis=-1), "wide": logits[..., :3]}

    def run():
        def loss(params, hidden):
            squares, rest = definition.bind(params).map_logits(score, hidden, labels, weights)
            return jnp.sum(squares), (squares, rest)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, hidden)

    expected = run()
    assert set(lengths) == {13}
    monkeypatch.setattr(transformer, "MAX_LOGITS", 2 * 5 * 32)
    lengths.clear()
    found = run()
    assert set(lengths) == {5}  # 13 = 5 + 5 + 3
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)


def test_low_precision_activations_end_in_float32_logits():
    _, params = tiny.make_model()
    low = dataclasses.replace(RELATIVE, dtype="bfloat16")
    found, exact = (forward(c)(params, PACKED.tokens, Slots.of(PACKED), CAUSAL) for c in (low, RELATIVE))
    assert found.dtype == jnp.float32
    error = np.abs(found - exact).max()
    assert 1e-4 < error < 0.1 * np.abs(exact).max()  # it did compute in bfloat16, and rightly


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_in_the_dtype_in_which_they_are_read_change_nothing(name):
    config = dataclasses.replace(CONFIGS[name], dtype="bfloat16")
    definition, params = tiny.make_model(config)
    read = definition.as_read(params)
    small = {path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(read) if x.dtype == jnp.bfloat16}
    assert {"embedding", "query", "wo"} <= small and not any("bias" in name or "scale" in name for name in small)
    found, expected = (forward(config)(x, PACKED.tokens, Slots.of(PACKED), CAUSAL) for x in (read, params))
    np.testing.assert_array_equal(found, expected)


def test_fresh_parameters_have_t5s_spread():
    config = dataclasses.replace(RELATIVE, embed_dim=64, head_dim=32, mlp_dim=256)
    params = jax.jit(ModelDefinition(config, tiny.VOCABULARY).init)(jax.random.key(0))
    block = params["decoder"]["blocks"]
    for kernel, variance in [
        (params["embedding"], 1),
        (block["attention"]["query"], 1 / (64 * 32)),
        (block["attention"]["key"], 1 / 64),
        (block["attention"]["value"], 1 / 64),
        (block["attention"]["out"], 1 / (4 * 32)),
        (block["mlp"]["wi_0"], 1 / 64),
        (block["mlp"]["wi_1"], 1 / 64),
        (block["mlp"]["wo"], 1 / 256),
    ]:
        assert kernel.dtype == jnp.float32
        assert np.var(kernel) == pytest.approx(variance, rel=5 * np.sqrt(2 / kernel.size))  # five standard errors
    assert not np.array_equal(*block["mlp"]["wi_0"])  # each layer draws its own


def test_a_vocabulary_larger_than_the_embedding_is_refused():
    with pytest.raises(UserError, match="vocab_size = 16 is too small"):
        ModelDefinition(dataclasses.replace(RELATIVE, vocab_size=16), tiny.VOCABULARY)
