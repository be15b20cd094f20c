"""Keys of config.json: those of published models, those that change the computation, and those of transformers."""

import dataclasses
import importlib
import re

import pytest
from published_configs import LLAMA3_8B, LLAMA3_SCALING, PUBLISHED, PUBLISHED_DIFFUSION

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import config_keys
from diffusion_t5x.importing.families import FAMILIES, kind_of
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.models.transformer import ModelDefinition

DIFFUSION = {kind for kind, family in FAMILIES.items() if family.published}


def read(config, most_layers=1000):
    """The model that a config.json describes, and what is said of keys passed over."""
    family = FAMILIES[config["model_type"]]
    keys = Keys(config, "config.json", family.aliases, most_layers)
    keys.ignore("vocab_size", "tie_word_embeddings")
    model = family.config(keys, True)
    if config["model_type"] in DIFFUSION:
        family.published(keys)
    return model, keys.judge()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read(name):
    config, passed_over = PUBLISHED[name]
    model, line = read(config)
    layers = next(config[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in config)
    assert model.num_layers == layers
    assert set(re.findall(r"([\w.]+) = ", line)) == set(passed_over)
    assert "\n" not in line


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
        ("is_causal", False),
        ("use_mrope", True),
        ("rope_interleaved", True),
        ("per_layer_config", {"0": {}}),
        ("attention_chunk_size", 64),
        ("vision_config", {"hidden_size": 8}),
    ],
)
def test_keys_that_change_the_computation_are_refused(name, key, value):
    if key == "auto_map" and "Phi-3" in name:
        pytest.skip("published ones have it, and `transformers` their code")
    with pytest.raises(UserError, match=rf"{key} = .* \({key}: .*--ignore_keys={key}\."):
        read(PUBLISHED[name][0] | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_sample", True),
        ("temperature", 0.7),
        ("max_length", 4096),
        ("is_encoder_decoder", False),
        ("_attn_implementation_autoset", True),
        ("num_logits_to_keep", None),
        ("some_note_of_mine", {"a": 1}),
        ("pretraining_tp", 2),
    ],
)
def test_keys_that_change_nothing_are_passed_over_with_a_note(key, value):
    model, line = read(LLAMA3_8B | {key: value})
    assert model == read(LLAMA3_8B)[0]
    assert (f"{key} = " in line) == (value is not None)
    assert ("transformers does not read" in line) == (key == "some_note_of_mine")


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_key_that_transformers_reads_is_known(kind):
    """So that a new version of transformers with a new key is noticed here, and not by wrong numbers."""
    pytest.importorskip("transformers")
    if kind in DIFFUSION:
        pytest.skip("transformers does not have it")
    names = {"gemma3_text": ("gemma3", "Gemma3TextConfig"), "gpt2": ("gpt2", "GPT2Config"), "mt5": ("mt5", "MT5Config")}
    names |= {"smollm3": ("smollm3", "SmolLM3Config"), "qwen3_moe": ("qwen3_moe", "Qwen3MoeConfig")}
    module, name = names.get(kind, (kind, f"{kind.capitalize()}Config"))
    theirs = getattr(importlib.import_module(f"transformers.models.{module}.configuration_{module}"), name)
    config = next(config for config, _ in PUBLISHED.values() if config["model_type"] == kind)
    family = FAMILIES[kind]
    assert theirs.attribute_map == family.aliases
    keys = Keys(config, "config.json", theirs.attribute_map)
    keys.ignore("vocab_size", "tie_word_embeddings")
    family.config(keys, True)
    fields = {field.name for field in dataclasses.fields(theirs)}
    read = keys.asked | family.aliases.keys()
    unknown = {field for field in fields if field not in read and not config_keys.is_known(field)}
    assert not unknown


def test_an_alias_is_the_key_it_stands_for():
    gpt2, t5 = PUBLISHED["gpt2"][0], PUBLISHED["t5-v1_1-base"][0]
    assert read(gpt2 | {"hidden_size": 768})[0] == read(gpt2)[0]
    with pytest.raises(UserError, match="hidden_size = 769 and n_embd = 768 are two names of one size"):
        read(gpt2 | {"hidden_size": 769})
    assert read({name: value for name, value in t5.items() if name != "num_layers"} | {"num_hidden_layers": 12})[0]


def test_more_layers_than_the_files_can_hold_are_refused_at_once():
    for name, key in (("Llama-2-7b-hf", "num_hidden_layers"), ("gpt2", "n_layer"), ("mt5-base", "num_layers")):
        with pytest.raises(UserError, match=f"{key} = 1000000000, but the files hold only 1000 tensors"):
            read(PUBLISHED[name][0] | {key: 1_000_000_000})


def test_what_is_absent_is_as_transformers_has_it():
    """And null is not absent where its default is something else."""
    gemma2, qwen3 = PUBLISHED["gemma-2-2b"][0], PUBLISHED["Qwen3-0.6B"][0]

    def without(config, *names):
        return {name: value for name, value in config.items() if name not in names}

    assert read(without(gemma2, "attn_logit_softcapping", "final_logit_softcapping"))[0] == read(gemma2)[0]
    model, _ = read(gemma2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (model.attention_softcap, model.logits_softcap) == (None, None)
    assert read(without(qwen3, "head_dim"))[0].head_dim == 128
    assert read(without(qwen3, "num_key_value_heads") | {"num_attention_heads": 64})[0].num_kv_heads == 32


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-0.6B"])
def test_windows_of_qwen(name):
    config = PUBLISHED[name][0]
    assert read(config)[0].local_layers is None
    on = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 20}
    model, _ = read(config | on)
    assert model.window == 64 and model.local_layers == tuple(layer >= 20 for layer in range(model.num_layers))
    kinds = ["sliding_attention", "full_attention"] * (model.num_layers // 2)
    assert read(config | on | {"layer_types": kinds})[0].local_layers == (True, False) * (model.num_layers // 2)
    with pytest.raises(UserError, match="layer_types has sliding_attention, but there is no sliding_window in use"):
        read(config | {"layer_types": kinds})
    with pytest.raises(UserError, match="should be a list of"):
        read(config | on | {"layer_types": kinds[1:]})


def test_windows_of_mistral():
    assert read(PUBLISHED["Mistral-7B-v0.1"][0])[0].local_layers == (True,) * 32
    assert read(PUBLISHED["Mistral-7B-v0.3"][0])[0].local_layers is None


def test_of_two_places_for_rotary_positions_the_one_of_transformers_counts():
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": LLAMA3_SCALING}
    model, _ = read(LLAMA3_8B | both)
    assert (model.rotary_factor, model.rotary_stretched) == (8.0, (2048.0, 8192.0))
    model, _ = read(LLAMA3_8B | {"rope_scaling": LLAMA3_SCALING, "original_max_position_embeddings": 4096})
    assert model.rotary_stretched == (1024.0, 4096.0)
    gemma = PUBLISHED["gemma-3-1b-it"][0]
    scaled = {"rope_type": "linear", "factor": 8.0}
    model, _ = read(gemma | {"rope_scaling": scaled})
    assert (model.rotary_factor, model.local_rotary_base) == (8.0, 10_000.0)
    with pytest.raises(UserError, match='sliding_attention: rope_type = "linear" is not supported'):
        read(gemma | {"rope_parameters": {"sliding_attention": scaled, "full_attention": scaled}})


@pytest.mark.parametrize("name", PUBLISHED_DIFFUSION)
def test_published_diffusion_models_are_read(name):
    config, passed_over = PUBLISHED_DIFFUSION[name]
    model, line = read(config)
    assert model.num_layers == config.get("n_layers", config.get("num_hidden_layers"))
    assert not model.reads_start and model.shifted == (config["model_type"] == "Dream")
    assert set(re.findall(r"([\w.]+) = ", line)) == set(passed_over)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("LLaDA-8B-Base", {"alibi": True}, "alibi = true is not supported, only false"),
        ("LLaDA-8B-Base", {"block_group_size": 2}, "block_group_size = 2 is not supported, only 1"),
        ("LLaDA-8B-Base", {"input_emb_norm": True}, "input_emb_norm = true is not supported"),
        ("LLaDA-8B-Base", {"activation_type": "swiglu"}, 'activation_type = "swiglu" is not supported, only "silu"'),
        ("Dream-v0-Instruct-7B", {"use_mrope": True}, "use_mrope = true"),
        ("SDAR-4B-Chat", {"attention_bias": True}, "attention_bias = true is not supported"),
        ("SDAR-30B-A3B", {"mlp_only_layers": [1, 2]}, r"by mlp_only_layers, the layers without experts are \[1, 2\]"),
        ("SDAR-30B-A3B", {"mlp_only_layers": 3}, "mlp_only_layers = 3 should be a list of layers"),
        ("SDAR-30B-A3B", {"mlp_only_layers": [0, 48]}, r"\[0, 48\] should be a list of layers, from 0 to 47"),
        ("SDAR-30B-A3B", {"norm_topk_prob": "no"}, 'norm_topk_prob = "no" is not supported, only false or true'),
        ("SDAR-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
        ("LLaDA2.0-mini", {"score_function": "softmax"}, 'score_function = "softmax" is not supported'),
        ("LLaDA2.0-mini", {"use_bias": True}, "use_bias = true is not supported"),
        (
            "LLaDA2.0-mini",
            {"num_shared_experts": "1"},
            'num_shared_experts = "1" should be a whole number of at least 0',
        ),
        ("LLaDA2.0-mini", {"first_k_dense_replace": -1}, "first_k_dense_replace = -1 should be a whole number"),
        ("LLaDA2.0-mini", {"n_group": 7}, "number = 256 must be a multiple of groups = 7"),
    ],
)
def test_other_diffusion_models_are_refused(name, changes, message):
    with pytest.raises(UserError, match=message):
        read(PUBLISHED_DIFFUSION[name][0] | changes)


@pytest.mark.parametrize(("name", "number"), [("Qwen3-30B-A3B", 30_532_122_624), ("Mixtral-8x7B-v0.1", 46_702_792_704)])
def test_mixtures_have_the_published_number_of_parameters(name, number):
    config = PUBLISHED[name][0]
    family = FAMILIES[config["model_type"]]
    model = family.config(Keys(config, "config.json", family.aliases), False)
    ids = TokenIds(size=24, pad_id=0, eos_id=1, mask_id=23, start_id=0, noise_ranges=((2, 23),))
    assert ModelDefinition(dataclasses.replace(model, vocab_size=config["vocab_size"]), ids).num_params() == number


def test_layers_without_positions():
    smollm3 = PUBLISHED["SmolLM3-3B"][0]
    every_fourth = tuple((layer + 1) % 4 == 0 for layer in range(36))
    assert read(smollm3)[0].unrotated_layers == every_fourth
    assert read(smollm3 | {"no_rope_layers": None})[0].unrotated_layers == every_fourth
    assert read(smollm3 | {"no_rope_layers": [1] * 36})[0].unrotated_layers is None
    with pytest.raises(UserError, match="2 in no_rope_layers is not supported, only 0 or 1"):
        read(smollm3 | {"no_rope_layers": [2] * 36})


@pytest.mark.parametrize("architectures", [[[]], [None, {}], "LlamaForCausalLM", None])
def test_architectures_of_any_kind_leave_the_model_type(architectures):
    assert kind_of({"model_type": "llama", "architectures": architectures}) == "llama"
