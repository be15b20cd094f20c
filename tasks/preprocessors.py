"""Pretraining objectives as SeqIO preprocessors: tokenised documents (feature `targets`) to `inputs` and `targets`.

All leave room for the EOS that `seqio.preprocessors.append_eos` adds to either feature, and lose no token. The spans
that they hide are unrelated to a diffusion objective's noise, which is drawn on device.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffusion_t5x.data.vocabularies import sentinels
from diffusion_t5x.errors import UserError

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf

SHUFFLE_BUFFER = 2_048  # chunks: some hundred documents' worth


def tokenize(
    dataset: "tf.data.Dataset", output_features: Mapping[str, "seqio.Feature"], copy_pretokenized: bool = True
) -> "tf.data.Dataset":
    """Tokenizes like SeqIO's `tokenize`, but reads ahead only as many examples as there are cores.

    SeqIO's own reads 256 examples ahead, which become part of every saved position; with long documents that is too
    many to reach the first batch.
    """
    import seqio
    import tensorflow as tf

    encode = functools.partial(
        seqio.preprocessors.tokenize_impl, output_features=output_features, copy_pretokenized=copy_pretokenized
    )
    return dataset.map(encode, num_parallel_calls=tf.data.AUTOTUNE)


def full_lm(
    dataset: "tf.data.Dataset", sequence_length: Mapping[str, int], output_features: Mapping[str, "seqio.Feature"]
) -> "tf.data.Dataset":
    """Returns chunks of a document as targets; the inputs are empty except for the EOS that follows.

    With `{"inputs": 1, "targets": n}` either architecture reads it; a decoder-only model's row begins with that EOS.
    """
    from t5.data import preprocessors

    del output_features
    if sequence_length["targets"] < 2:
        raise UserError(f"Full LM needs at least 2 target tokens, not {sequence_length['targets']}.")
    chunks = preprocessors.split_tokens(dataset, max_tokens_per_segment=sequence_length["targets"] - 1)
    return chunks.map(lambda x: {"inputs": x["targets"][:0], "targets": x["targets"]})


def prefix_lm(
    dataset: "tf.data.Dataset", sequence_length: Mapping[str, int], output_features: Mapping[str, "seqio.Feature"]
) -> "tf.data.Dataset":
    """Returns chunks of a document, split at random: the first part (at least a token) as inputs, then targets.

    Like t5's `prefix_lm`, but a chunk leaves room for the EOS after either part: wherever it is cut, both parts fit.
    With equal lengths, two chunks fill a packed row to the last position.
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


def continuation(
    dataset: "tf.data.Dataset", sequence_length: Mapping[str, int], output_features: Mapping[str, "seqio.Feature"]
) -> "tf.data.Dataset":
    """Returns chunks of a document as long as the targets: up to `inputs` tokens of the beginning, then targets.

    For decoder-only models: the text goes on in the targets as if it were not cut, and EOS stands only where a document
    ends. With short inputs, most tokens are targets.
    """
    import tensorflow as tf
    from t5.data import preprocessors

    longest, chunk = sequence_length["inputs"], sequence_length["targets"]
    if longest < 1 or chunk < 2:
        raise UserError(f"Continuation needs at least 1 token of inputs and 2 of targets, not {dict(sequence_length)}.")
    eos = output_features["targets"].vocabulary.eos_id

    def end(features):
        return features | {"targets": tf.concat([features["targets"], [eos]], axis=0)}

    def is_input(length, noise_density, seeds):
        del noise_density
        most = tf.minimum(longest, length - 1)
        inputs = tf.random.stateless_uniform([], seeds[0], minval=tf.minimum(1, most), maxval=most + 1, dtype=tf.int32)
        return tf.range(length) < inputs

    return preprocessors.denoise(
        preprocessors.split_tokens(dataset.map(end), max_tokens_per_segment=chunk),
        output_features,
        noise_density=0.5,
        noise_mask_fn=is_input,
        inputs_fn=preprocessors.drop_nonnoise_tokens,
        targets_fn=preprocessors.drop_noise_tokens,
    )


# EOS is its own matter, see `registration.task`. An attribute, because gin wraps the function.
continuation.ends_documents = True  # type: ignore[attr-defined]


def span_corruption(
    dataset: "tf.data.Dataset",
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, "seqio.Feature"],
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
) -> "tf.data.Dataset":
    """Returns chunks with spans replaced by sentinels, and the spans after their sentinels (arXiv 1910.10683).

    Like t5's `span_corruption`, but documents are not joined: chunks are cut so that their inputs fill the inputs'
    length.

    Args:
      dataset: the documents.
      sequence_length: lengths of both features.
      output_features: features with a vocabulary that has sentinels.
      noise_density: share of the tokens to hide.
      mean_noise_span_length: mean length of a hidden span, in tokens.

    Raises:
      UserError: there are no sentinels, or the targets are too short for the tokens to hide in the inputs.
    """
    from t5.data import preprocessors

    output_features = _ending_in_sentinels(output_features)
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


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One of UL2's denoisers (arXiv 2205.05131).

    Attributes:
      mode: text before the inputs that names the kind of denoiser.
      noise_density: share of the tokens to hide.
      mean_span_length: mean length of a hidden span, in tokens; None hides the end of the chunk, as prefix LM does.
    """

    mode: str
    noise_density: float
    mean_span_length: float | None


UL2_DENOISERS = (  # table 1 of the paper
    Denoiser("[R]", 0.15, 3),
    Denoiser("[R]", 0.15, 8),
    Denoiser("[S]", 0.25, None),
    Denoiser("[X]", 0.5, 3),
    Denoiser("[X]", 0.5, 8),
    Denoiser("[X]", 0.15, 64),
    Denoiser("[X]", 0.5, 64),
)


def ul2(
    dataset: "tf.data.Dataset",
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, "seqio.Feature"],
    denoisers: Sequence[Denoiser] = UL2_DENOISERS,
) -> "tf.data.Dataset":
    """Applies UL2's mixture of denoisers: each chunk of a document gets one of them, chosen uniformly.

    R hides short spans, X long or many ones, both behind sentinels; S hides the end, a share of the chunk that is drawn
    uniformly from zero to twice `noise_density`. Chunks are as long as all denoisers have room and sentinels for.

    Raises:
      UserError: there are no sentinels, or the lengths have no room for two tokens.
    """
    import seqio
    import tensorflow as tf
    from t5.data import preprocessors

    vocabulary = output_features["targets"].vocabulary
    ending = _ending_in_sentinels(output_features)["targets"].vocabulary
    modes = [vocabulary.encode(denoiser.mode) for denoiser in denoisers]
    room = (
        sequence_length["inputs"] - 1 - max(map(len, modes)),
        sequence_length["targets"] - 1,
        len(sentinels(vocabulary)),
    )
    longest = min(_longest_chunk(denoiser, room) for denoiser in denoisers)
    if longest < 2:
        raise UserError(f"UL2 needs longer inputs and targets than {dict(sequence_length)}.")

    def denoised(denoiser: Denoiser, mode: list[int], tokens: "tf.Tensor", seeds: "tf.Tensor"):
        if denoiser.mean_span_length is None:
            # t5 calls the part that is given noise.
            given = preprocessors.random_prefix_noise_mask(tf.size(tokens), denoiser.noise_density, seeds)
            inputs, targets = tf.boolean_mask(tokens, given), tf.boolean_mask(tokens, ~given)
        else:
            hidden = _spans_mask(tf.size(tokens), denoiser, seeds)
            inputs = preprocessors.noise_span_to_unique_sentinel(tokens, hidden, ending, seeds)
            targets = preprocessors.nonnoise_span_to_unique_sentinel(tokens, hidden, ending, seeds)
        return tf.concat([tf.constant(mode, tokens.dtype), inputs], 0), targets

    @seqio.map_over_dataset(num_seeds=4)
    def denoise(features, seeds):
        branches = [
            functools.partial(denoised, denoiser, mode, features["targets"], seeds[:3])
            for denoiser, mode in zip(denoisers, modes, strict=True)
        ]
        choice = tf.random.stateless_uniform([], seeds[3], 0, len(denoisers), tf.int32)
        inputs, targets = tf.switch_case(choice, branches)
        return {"inputs": inputs, "targets": targets}

    return denoise(preprocessors.split_tokens(dataset, max_tokens_per_segment=longest))


def _spans_mask(length: "tf.Tensor", denoiser: Denoiser, seeds: "tf.Tensor") -> "tf.Tensor":
    """Returns bool `[length]`: t5's random-spans mask, which ends in a span, rotated by a random number of tokens.

    So a single span may be anywhere, and the first token is never hidden: sentinels come before the spans they stand
    for.
    """
    import tensorflow as tf
    from t5.data import preprocessors

    mask = preprocessors.random_spans_noise_mask(
        length, denoiser.noise_density, seeds[:2], mean_noise_span_length=denoiser.mean_span_length
    )
    before_first_span = tf.argmax(mask, output_type=tf.int32)
    moved = tf.random.stateless_uniform([], seeds[2], 0, tf.maximum(before_first_span, 1), tf.int32)
    return tf.roll(mask, -moved, 0)


def _longest_chunk(denoiser: Denoiser, room: tuple[int, int, int]) -> int:
    """Returns the maximum length of a chunk, by the room in inputs and targets without EOS and by the sentinels."""

    def needs(length: int) -> tuple[int, int, int]:
        if denoiser.mean_span_length is None:  # either part may be nearly all of the chunk
            return length, length, 0
        # As t5 computes them, in float32. Behind the last hidden span the targets have one more sentinel.
        hidden = int(np.clip(np.round(np.float32(length) * np.float32(denoiser.noise_density)), 1, length - 1))
        spans = max(int(np.round(np.float32(hidden) / np.float32(denoiser.mean_span_length))), 1)
        return length - hidden + spans, hidden + spans + 1, spans + 1

    def fits(length: int) -> bool:
        return all(need <= there for need, there in zip(needs(length), room, strict=True))

    return sum(1 for _ in itertools.takewhile(fits, itertools.count(2))) + 1


def _ending_in_sentinels(output_features: Mapping[str, "seqio.Feature"]) -> dict[str, "seqio.Feature"]:
    """Returns the features as t5's preprocessors need them: the last id of a vocabulary is its first sentinel."""
    import seqio

    ending = {}
    for name, feature in output_features.items():
        if not (ids := sentinels(feature.vocabulary)):
            raise UserError(
                "Span corruption and UL2 need a vocabulary with sentinels, the tokens <extra_id_0>, <extra_id_1>, ...: "
                "bytes (VOCABULARY_FILE=None), a SentencePiece model or a T5's tokenizer.json has them."
            )
        ending[name] = dataclasses.replace(feature, vocabulary=seqio.PassThroughVocabulary(ids[0] + 1))
    return ending
