"""Pretraining objectives as SeqIO preprocessors: tokenised documents (feature `targets`) to `inputs` and `targets`.

Both leave room for the EOS that `seqio.preprocessors.append_eos` adds to either feature, and lose no token. What they
hide has nothing to do with a diffusion objective's noise, which is drawn on device.
"""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from diffusion_t5x.errors import UserError


def prefix_lm(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int], output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
    """Chunks of a document, the first part (of random length, at least one token) given, the rest asked.

    As t5's `prefix_lm`, but a chunk leaves room for the EOS after either part: wherever it is cut, both parts fit. With
    equal lengths two chunks fill a packed row to the last position.
    """
    from t5.data import preprocessors

    chunk = min(sequence_length.values()) - 2
    if chunk < 2:
        raise UserError(f"Prefix LM needs at least 4 tokens of inputs and of targets, not {dict(sequence_length)}.")
    return preprocessors.denoise(
        preprocessors.split_tokens(dataset, max_tokens_per_segment=chunk),
        output_features,
        noise_density=0.5,
        noise_mask_fn=preprocessors.random_prefix_noise_mask,
        inputs_fn=preprocessors.drop_nonnoise_tokens,
        targets_fn=preprocessors.drop_noise_tokens,
    )


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.Feature],
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
) -> tf.data.Dataset:
    """Chunks of a document with spans replaced by sentinels, and these spans behind their sentinels (arXiv 1910.10683).

    t5's `span_corruption`, documents not joined: chunks are cut so that their inputs fill the inputs' length.

    Args:
      dataset: of documents.
      sequence_length: of both features.
      output_features: with a vocabulary that has sentinels (`extra_ids`).
      noise_density: share of the tokens that is hidden.
      mean_noise_span_length: in tokens.

    Raises:
      UserError: no sentinels, or the targets' length is too short for what the inputs' length asks to hide.
    """
    from t5.data import preprocessors

    if not output_features["inputs"].vocabulary.extra_ids:
        raise UserError("Span corruption needs a vocabulary with sentinels: give it extra_ids, 100 in T5.")
    _, targets_length = preprocessors.random_spans_helper(
        inputs_length=sequence_length["inputs"],
        noise_density=noise_density,
        mean_noise_span_length=mean_noise_span_length,
        extra_tokens_per_span_inputs=1,
        extra_tokens_per_span_targets=1,
    )
    if sequence_length["targets"] < targets_length:
        raise UserError(
            f"Span corruption of {sequence_length['inputs']} tokens of inputs makes {targets_length} tokens of "
            f"targets: set TASK_FEATURE_LENGTHS to at least that, not {sequence_length['targets']}."
        )
    return preprocessors.span_corruption(
        dataset,
        sequence_length,
        output_features,
        mean_noise_span_length=mean_noise_span_length,
        noise_density=noise_density,
        merge_examples_to_reduce_padding=False,
    )
