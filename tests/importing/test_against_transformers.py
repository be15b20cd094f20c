"""Models imported from Hugging Face format, against `transformers` itself: their logits, and the way back."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import open_models
import pytest
import theirs
from in_torch import as_batch, load_ours, run_theirs

from diffusion_t5x.convert import convert
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.masks import CAUSAL, Slots

pytest.importorskip("seqio")

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed: pip install diffusion_t5x[hf]", allow_module_level=True)

DTYPES = list(theirs.DTYPES)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folder of the models of `theirs`: NAME/DTYPE."""
    folder = tmp_path_factory.mktemp("sources")
    run_theirs("write", folder)
    return folder


@pytest.fixture(scope="module")
def there_and_back(sources, tmp_path_factory):
    """The folders of a model: as it was, imported, and brought back."""
    converted = {}

    def convert_once(name, dtype):
        if (name, dtype) not in converted:
            folder = tmp_path_factory.mktemp(f"{name}_{dtype}")
            convert(["from_hf", str(sources / name / dtype), "--output", str(folder / "here")])
            convert(["to_hf", str(folder / "here"), "--output", str(folder / "back")])
            converted[name, dtype] = (sources / name / dtype, folder / "here", folder / "back")
        return converted[name, dtype]

    return convert_once


@pytest.mark.parametrize("name", theirs.MODELS)
def test_logits_of_whole_rows_and_token_by_token(name, there_and_back):
    source, here, _ = there_and_back(name, "float32")
    definition, params = load_ours(here)
    said = np.load(source / "logits.npz")
    expected, there = said["logits"], said["there"]
    assert expected[there].std() > 0.2
    batch = jax.tree.map(jnp.asarray, as_batch(said, definition.config.architecture == "encoder_decoder"))
    slots = Slots.of(batch)

    @jax.jit
    def both_ways(params, prompt=448):
        """Whole rows; and a prompt in one pass, then token by token over the cache."""
        model = definition.bind(params)
        encoded = model.encode(batch)
        whole = model(batch.tokens, slots, CAUSAL, encoded).hidden
        start = jnp.zeros(len(there), jnp.int32)
        cache = KVCache.empty(definition.config, slots)
        first, cache = model.extend(batch.tokens[:, :prompt], CAUSAL, cache, start, encoded)

        def step(cache, at):
            token = jax.lax.dynamic_slice_in_dim(batch.tokens, at, 1, axis=1)
            hidden, cache = model.extend(token, CAUSAL, cache, start + at, encoded)
            return cache, hidden[:, 0]

        _, rest = jax.lax.scan(step, cache, jnp.arange(prompt, there.shape[1]))
        in_steps = jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1)
        return model.logits(whole), model.logits(in_steps)

    for found in both_ways(params):
        np.testing.assert_allclose(found[..., : expected.shape[-1]][there], expected[there], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", theirs.MODELS)
def test_logits_in_bfloat16_stay_close(name, there_and_back):
    """Errors as shares of the logits' standard deviation, of activations that keep 8 bits."""
    source, here, _ = there_and_back(name, "float32")
    definition, params = load_ours(here, dtype="bfloat16")
    said = np.load(source / "logits.npz")
    batch = jax.tree.map(jnp.asarray, as_batch(said, definition.config.architecture == "encoder_decoder"))

    @jax.jit
    def logits(params):
        model = definition.bind(params)
        return model.logits(model(batch.tokens, Slots.of(batch), CAUSAL, model.encode(batch)).hidden)

    expected, there = said["logits"], said["there"]
    error = (np.asarray(logits(params))[..., : expected.shape[-1]] - expected)[there] / expected[there].std()
    if definition.config.experts:  # where the scores of two experts nearly tie, rounding chooses the other one
        worst = np.abs(error).max(axis=-1)
        error = error[worst < np.quantile(worst, 0.8)]
    assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.03 and np.abs(error).max() < 0.4


@pytest.mark.parametrize("name", theirs.MODELS)
def test_mask_is_behind_the_tokenizers_ids(name, there_and_back):
    source, here, _ = there_and_back(name, "float32")
    definition, params = load_ours(here)
    ids = definition.vocabulary
    assert (ids.mask_id, ids.eos_id, ids.pad_id) == (theirs.IDS, 0, 1)
    tensors = open_models.read_shards(source)
    table = next(tensors[table] for table in theirs.EMBEDDINGS if table in tensors)
    np.testing.assert_array_equal(params["embedding"][: len(table)], table)
    if name == "llama2":  # which has no row in reserve
        assert definition.config.vocab_size == 384
        np.testing.assert_allclose(params["embedding"][300:], np.tile(table.mean(0), (84, 1)), atol=1e-6)
    else:
        assert definition.config.vocab_size == len(table) == 320
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (here / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", theirs.MODELS)
def test_the_way_back_is_exact(name, dtype, there_and_back):
    source, _, back = there_and_back(name, dtype)
    expected, found = open_models.read_shards(source), open_models.read_shards(back)
    assert found.keys() == expected.keys()
    for tensor in expected:
        assert found[tensor].dtype == theirs.DTYPES[dtype] and found[tensor].tobytes() == expected[tensor].tobytes()


def test_transformers_loads_what_comes_back(there_and_back):
    folders = [there_and_back(name, "float32") for name in theirs.MODELS]
    run_theirs("same", *(folder for source, _, back in folders for folder in (source, back)))
