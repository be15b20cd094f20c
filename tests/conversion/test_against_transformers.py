"""Models imported from Hugging Face's format, against `transformers` itself: their logits, and the way back."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import gin
import jax
import jax.numpy as jnp
import numpy as np
import open_models
import pytest
import theirs

from diffusion_t5x import config, partitioning
from diffusion_t5x.convert import convert
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.masks import CAUSAL, Slots

pytest.importorskip("seqio")
from diffusion_t5x.tasks import registration

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed: pip install diffusion_t5x[hf]", allow_module_level=True)

DTYPES = list(theirs.DTYPES)


def run_theirs(*arguments):
    script = pathlib.Path(theirs.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


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


def load_ours(folder):
    """As eval and infer load it."""
    config.load([str(folder / "model.gin")])
    model = ModelConfig(**gin.get_bindings(ModelConfig))
    ids = token_ids(registration.vocabulary(str(folder / "tokenizer.json")))
    return load_model(str(folder), model, ids, partitioning.MeshConfig().make())


def as_batch(said, has_encoder):
    there, inputs_there = said["there"], said["inputs_there"]
    places = np.arange(there.shape[1])
    return Batch(
        tokens=said["tokens"],
        target_mask=there,
        segment_ids=there.astype(np.int32),
        positions=np.where(there, places, 0),
        example_ids=np.arange(len(there)),
        encoder_tokens=said["inputs"] if has_encoder else None,
        encoder_segment_ids=inputs_there.astype(np.int32) if has_encoder else None,
        encoder_positions=np.where(inputs_there, places, 0) if has_encoder else None,
    )


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
        whole = model(batch.tokens, slots, CAUSAL, encoded)
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
def test_mask_is_behind_the_tokenizers_ids(name, there_and_back):
    source, here, _ = there_and_back(name, "float32")
    definition, params = load_ours(here)
    ids = definition.vocabulary
    assert (ids.mask_id, ids.eos_id, ids.pad_id) == (theirs.IDS, 0, 1)
    tensors = open_models.read_shards(source)
    table = next(tensors[table] for table in ("model.embed_tokens.weight", "shared.weight") if table in tensors)
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
