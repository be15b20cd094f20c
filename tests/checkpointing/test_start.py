"""A checkpoint's record of its model: the advice where it does not fit, and the summary where it does."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny

from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.assignment import named_leaves
from diffusion_t5x.checkpointing.start import check_start, model_settings
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition

TINY = ModelConfig(  # of sizes/tiny.gin
    embed_dim=96, num_layers=4, num_heads=3, head_dim=32, mlp_dim=256, relative_buckets=128, vocab_size=32
)


def abstract(config):
    return {"params": ModelDefinition(config, tiny.VOCABULARY).abstract()}


def save(folder, config, vocabulary=tiny.VOCABULARY, **more):
    """Without values, which nothing here reads."""
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), {**abstract(config), **more})
    store = checkpoints.Checkpoints(str(folder), asynchronous=False)
    store.save(5, state, {}, {"vocabulary": vocabulary.describe()})
    store.close()
    return str(folder)


@pytest.mark.parametrize(
    "config",
    [tiny.RELATIVE, tiny.LLAMA, tiny.GPT2, tiny.ENCODER_DECODER],
    ids=["t5", "llama", "gpt2", "encoder"],
)
def test_parameters_tell_the_settings_of_their_model(config):
    found = model_settings(named_leaves(abstract(config)))
    assert {"embed_dim", "num_layers", "num_kv_heads", "tie_embeddings", "architecture"} <= found.keys()
    expected = {**dataclasses.asdict(config), "num_kv_heads": config.kv_heads}
    assert found == {name: expected[name] for name in found}
    assert model_settings({"params/w": jnp.zeros(2), "step": jnp.zeros(())}) == {}


def test_all_that_differs_is_one_message_with_what_to_set(tmp_path):
    path = save(tmp_path, TINY, dataclasses.replace(tiny.VOCABULARY, fingerprint="other", size=25))
    with pytest.raises(UserError) as error:
        check_start(path, tiny.VOCABULARY, abstract(tiny.LLAMA))
    vocabulary, *table, advice = str(error.value).splitlines()
    assert "trained with another vocabulary (name , size 25, mask_id 23, fingerprint other)" in vocabulary
    rows = [" ".join(line.split()) for line in table]
    assert "params/embedding float32[32, 16] float32[32, 96]" in rows
    assert "params/head float32[16, 32] -" in rows
    assert "params/decoder/relative_bias/embedding - float32[128, 3]" in rows
    assert advice == (
        "The checkpoint's model has ModelConfig.embed_dim = 96 (here 16), num_layers = 4 (here 2), num_heads = 3 "
        "(here 4), head_dim = 32 (here 4), mlp_dim = 256 (here 32), num_kv_heads = 3 (here 2), tie_embeddings = True "
        "(here False), query_key_norm = False (here True), position = 'relative' (here 'rotary'), relative_buckets = "
        "128 (here None)."
    )


def test_another_architecture(tmp_path):
    path = save(tmp_path, tiny.ENCODER_DECODER)
    with pytest.raises(UserError, match=r"architecture = 'encoder_decoder' \(here 'decoder_only'\), tie"):
        check_start(path, tiny.VOCABULARY, abstract(tiny.RELATIVE))


def test_what_becomes_of_each_array_is_told(tmp_path):
    path = save(tmp_path, tiny.RELATIVE, step=jnp.int32(5), opt_state=[jnp.zeros(3)] * 4)
    state = {**abstract(tiny.RELATIVE), "step": jnp.int32(0), "opt_state": [jnp.zeros(2)] * 3}
    state["ema"] = state["params"]
    rules = [("step|opt_state/.*", None), ("ema/(.*)", r"params/\1")]
    assert check_start(path, tiny.VOCABULARY, state, rules).splitlines() == [
        "  params/ (12 arrays) as in the checkpoint",
        "  opt_state/ (3 arrays), step start fresh, by the rule ('step|opt_state/.*', None)",
        r"  ema/ (12 arrays) come from params/\1, by the rule ('ema/(.*)', 'params/\\1')",
        "  opt_state/ (4 arrays), step of the checkpoint are not read",
    ]


def test_a_model_dir_of_another_size_is_one_line(tmp_path):
    path = save(tmp_path, TINY)
    with pytest.raises(UserError) as error:
        check_start(path, tiny.VOCABULARY, abstract(tiny.RELATIVE), merge=False, resumes=True)
    (line,) = str(error.value).splitlines()
    assert "is of another model. The checkpoint's model has ModelConfig.embed_dim = 96 (here 16)" in line
    assert line.endswith(" Or choose another MODEL_DIR.") and error.value.settings["embed_dim"] == 96


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"opt_state": [jnp.zeros(2)] * 9}, "an optimizer (train.train.optimizer)"),
        ({"ema": {"embedding": jnp.zeros(2)}}, "a moving average (train.train.ema_decay)"),
    ],
)
def test_other_settings_than_the_models_are_one_line(changed, said, tmp_path):
    path = save(tmp_path, tiny.RELATIVE, opt_state=[jnp.zeros(3)] * 4)
    state = {**abstract(tiny.RELATIVE), "opt_state": [jnp.zeros(3)] * 4} | changed
    with pytest.raises(UserError) as error:
        check_start(path, tiny.VOCABULARY, state, merge=False, resumes=True)
    (line,) = str(error.value).splitlines()
    assert f"saved with different settings of {said}. Set the same, or start another run" in line
