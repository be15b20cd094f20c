"""Table of the config.json keys that a family's own reader does not ask for.

`transformers` does not read any other key for the supported families (a test compares these sets with its configuration
classes): such a key cannot change what the model computes, and is ignored with a note.
"""

from collections.abc import Mapping
from typing import Any

# Ordinary metadata, in nearly every config.json: names and versions, training, special ids (which the tokenizer's files
# name), and how a program runs the model. Passed over without a note.
QUIET = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "classifier_dropout",
    "decoder_start_token_id", "dropout_rate", "dtype", "eos_token_id", "gradient_checkpointing", "initializer_factor",
    "initializer_range", "is_decoder", "model_type", "pad_token_id", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache",
})  # fmt: skip

# Known to change nothing in what a model computes, by what they are about. Passed over with a note.
HARMLESS: Mapping[str, frozenset[str]] = {
    "fields of Gemma 3 that nothing reads": frozenset({"attn_logit_softcapping"}),
    "names, and traces of programs that saved the file": frozenset({
        "_commit_hash", "_from_auto", "finetuning_task", "model_name", "name_or_path", "pretraining_tp",
        "transformers.js_config", "unsloth_fixed", "unsloth_version", "_unsloth_finetuned", "_unsloth_template_fixed",
    }),
    "how a program runs the model": frozenset({
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
        "_experts_implementation", "_flash_attn_2_enabled", "_output_attentions", "_pre_quantization_dtype",
        "attn_implementation", "cache_config", "cache_implementation", "chunk_size_feed_forward", "disable_compile",
        "experts_implementation", "output_attentions", "output_hidden_states", "output_past", "return_dict",
        "tf_legacy_loss", "torchscript", "use_bfloat16", "use_flash_attn", "use_flash_attention", "use_kernels",
    }),
    "classifiers and training": frozenset({
        "_num_labels", "id2label", "keys_to_ignore_at_inference", "label2id", "loss_type", "num_labels",
        "problem_type", "task_specific_params", "use_gradient_checkpointing",
    }),
    "ids of special tokens": frozenset({"cls_token_id", "mask_token_id", "sep_token_id", "unk_token_id"}),
    "generation settings, which older versions kept here": frozenset({
        "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "bad_words_ids",
        "begin_suppress_tokens", "diversity_penalty", "do_sample", "dola_layers", "early_stopping",
        "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
        "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id",
        "generation_config", "guidance_scale", "length_penalty", "low_memory", "max_length", "max_new_tokens",
        "max_time", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences", "output_logits",
        "output_scores", "penalty_alpha", "prefix", "prompt_lookup_num_tokens", "remove_invalid_values",
        "renormalize_logits", "repetition_penalty", "return_dict_in_generate", "sequence_bias", "stop_strings",
        "suppress_tokens", "target_lookbehind", "temperature", "token_healing", "top_k", "top_p", "typical_p",
        "watermarking_config",
    }),
}  # fmt: skip

# Harmless with this value alone, and why any other is refused.
ONLY: Mapping[str, tuple[Any, str]] = {
    "add_cross_attention": (False, "a decoder that reads an encoder is not supported for this family"),
    "is_causal": (True, "published weights are read as a causal model's"),
    "is_encoder_decoder": (False, "encoder-decoders are supported for t5 and mt5"),
    "is_llama_config": (True, "the weights lie otherwise than Llama's"),
    "partial_rotary_factor": (1.0, "all of a head is rotated"),
    "rope_interleaved": (False, "rotary pairs are halves of a head, not neighbours"),
    "tie_encoder_decoder": (False, "encoder and decoder have weights of their own"),
    "pruned_heads": ({}, "all layers have the same heads"),
    "use_bidirectional_attention": (False, "published weights are read as a causal model's"),
    "use_mrope": (False, "positions are those of text"),
}

# Read by `transformers` for every family or for how weights are stored; not implemented here.
REFUSED: Mapping[str, str] = {
    "attention_chunk_size": "attention in chunks",
    "auto_map": "the folder's own code says what the model computes",
    "compression_config": "weights are compressed",
    "fusion_config": "layers are fused",
    "layer_types": "layers of several kinds",
    "original_max_position_embeddings": "the length that rotary positions are scaled from",
    "per_layer_config": "layers that differ",
    "quantization_config": "weights are quantised; save the model in bfloat16 or float32 first",
    "rope_parameters": "rotary positions",
    "rope_scaling": "scaled rotary positions",
    "sliding_window": "layers that see a window only",
    "text_config": "a model inside of another one",
    "unpadded_vocab_size": "logits that are cut",
    "vision_config": "a model that sees images",
}


def is_known(name: str) -> bool:
    """True if a key is in the table."""
    return name in QUIET or name in ONLY or name in REFUSED or any(name in names for names in HARMLESS.values())


def refusal(name: str, value: Any) -> str | None:
    """Returns the reason why a key with this value is refused; None if it is accepted."""
    if name in ONLY:
        expected, why = ONLY[name]
        return None if value == expected else why
    return REFUSED.get(name)
