"""Converts SeqIO's `inputs` and `targets` to the rows of a `Batch`. Imports TensorFlow: import it inside functions."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import seqio
import tensorflow as tf

Features = Mapping[str, tf.Tensor]
Spec = seqio.FeatureConverter.FeatureSpec


class RowConverter(seqio.FeatureConverter, abc.ABC):
    """Rows of clean, unshifted tokens, as in `data.batch.Batch`; three layouts of targets (METHODS: target canvas):

      plain    targets, padding
      canvas   a canvas of the targets' length: the targets, and after them pad tokens, which are targets as well
      pack     plain examples one after another, as many as fit, each a segment of its own

    Args:
      has_inputs: True if the task has a feature `inputs`.
      pack: several examples per row.
      canvas: pad the targets to their length. Excludes `pack`.
      pad_id: the pad token.
    """

    PACKING_FEATURE_DTYPES: ClassVar[dict[str, Any]] = {}

    def __init__(self, has_inputs: bool = True, pack: bool = False, canvas: bool = False, pad_id: int = 0):
        names = ("inputs", "targets") if has_inputs else ("targets",)
        self.TASK_FEATURES = {name: Spec(dtype=tf.int32) for name in names}
        self._canvas = canvas
        self._pad_id = pad_id
        super().__init__(pack=pack, apply_length_check=False)  # costs two passes; the shapes below are static

    @abc.abstractmethod
    def convert_example(self, features: Features, task_feature_lengths: Mapping[str, int]) -> Features:
        """One example as one row (the layouts without packing)."""

    @abc.abstractmethod
    def _pack_rows(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        """Packs plain examples into rows."""

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        if self.pack:
            return self._pack_rows(ds, task_feature_lengths)
        return ds.map(lambda x: self.convert_example(x, task_feature_lengths), num_parallel_calls=tf.data.AUTOTUNE)

    def _targets(self, features: Features, task_feature_lengths: Mapping[str, int]) -> tf.Tensor:
        """Returns the targets, in the layout "canvas" with pad tokens after them."""
        targets = features["targets"]
        blank = task_feature_lengths["targets"] - tf.size(targets) if self._canvas else 0
        return tf.pad(targets, [[0, blank]], constant_values=self._pad_id)

    def _fill_up(self, values: tf.Tensor, length: int, filler: int | None = None) -> tf.Tensor:
        """Returns `[length]`: the values, then the filler (by default pad tokens)."""
        filler = self._pad_id if filler is None else filler
        return tf.ensure_shape(tf.pad(values, [[0, length - tf.size(values)]], constant_values=filler), [length])


class DecoderOnlyConverter(RowConverter):
    """Rows for a decoder-only model: `inputs` (if the task has any), then `targets`, then padding.

    Every row is as long as the feature lengths together.
    """

    MODEL_FEATURES: ClassVar = {
        "tokens": Spec(dtype=tf.int32),
        "target_mask": Spec(dtype=tf.bool),
        "segment_ids": Spec(dtype=tf.int32),
        "positions": Spec(dtype=tf.int32),
    }

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        return dict.fromkeys(self.MODEL_FEATURES, sum(task_feature_lengths.values()))

    def convert_example(self, features: Features, task_feature_lengths: Mapping[str, int]) -> Features:
        length = sum(task_feature_lengths.values())
        tokens, target_mask = self._join(features, task_feature_lengths)
        there = tf.sequence_mask(tf.size(tokens), length)
        return {
            "tokens": self._fill_up(tokens, length),
            "target_mask": self._fill_up(target_mask, length, False),
            "segment_ids": tf.cast(there, tf.int32),
            "positions": tf.where(there, tf.range(length), 0),
        }

    def _join(self, features: Features, task_feature_lengths: Mapping[str, int]) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the tokens of an example, and True for each that is a target."""
        targets = self._targets(features, task_feature_lengths)
        inputs = features["inputs"] if "inputs" in self.TASK_FEATURES else targets[:0]
        return tf.concat([inputs, targets], 0), tf.concat([tf.zeros_like(inputs), tf.ones_like(targets)], 0) > 0

    def _pack_rows(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        # SeqIO's packing takes a zero for padding, whatever it means, and is slow: one feature of positive numbers
        # carries token and mask both.
        def encode(features: Features) -> Features:
            tokens, target_mask = self._join(features, task_feature_lengths)
            return {"row": 1 + 2 * tokens + tf.cast(target_mask, tf.int32)}

        def decode(packed: Features) -> Features:
            there, content = packed["row"] > 0, packed["row"] - 1
            return {
                "tokens": tf.where(there, content // 2, self._pad_id),
                "target_mask": there & (content % 2 == 1),
                "segment_ids": packed["row_segment_ids"],
                "positions": packed["row_positions"],
            }

        ds = ds.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
        ds = self._pack_or_pad(ds, {"row": sum(task_feature_lengths.values())})
        return ds.map(decode, num_parallel_calls=tf.data.AUTOTUNE)


class PairConverter(DecoderOnlyConverter):
    """Rows of two texts for the same inputs, `targets` and `rejected`, each as it would be in a row of its own.

    The second one's segment is 2, and its positions begin at 0 again.
    """

    def __init__(self, canvas: bool = False, pad_id: int = 0):
        super().__init__(canvas=canvas, pad_id=pad_id)
        self.TASK_FEATURES["rejected"] = Spec(dtype=tf.int32)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        return dict.fromkeys(self.MODEL_FEATURES, 2 * sum(self._of_text(task_feature_lengths).values()))

    def convert_example(self, features: Features, task_feature_lengths: Mapping[str, int]) -> Features:
        lengths = self._of_text(task_feature_lengths)
        chosen = super().convert_example(features, lengths)
        rejected = super().convert_example({**features, "targets": features["rejected"]}, lengths)
        rejected = {**rejected, "segment_ids": 2 * rejected["segment_ids"]}
        return {name: tf.concat([chosen[name], rejected[name]], 0) for name in chosen}

    def _of_text(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        return {name: length for name, length in task_feature_lengths.items() if name != "rejected"}


class EncoderDecoderConverter(RowConverter):
    """Rows for an encoder-decoder: `inputs` for the encoder, `targets` for the decoder, each of its own length."""

    MODEL_FEATURES: ClassVar = DecoderOnlyConverter.MODEL_FEATURES | {
        "encoder_tokens": Spec(dtype=tf.int32),
        "encoder_segment_ids": Spec(dtype=tf.int32),
        "encoder_positions": Spec(dtype=tf.int32),
    }

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        return {
            name: task_feature_lengths["inputs" if name.startswith("encoder_") else "targets"]
            for name in self.MODEL_FEATURES
        }

    def convert_example(self, features: Features, task_feature_lengths: Mapping[str, int]) -> Features:
        row = {}
        for prefix, name in (("encoder_", "inputs"), ("", "targets")):
            tokens = features["inputs"] if name == "inputs" else self._targets(features, task_feature_lengths)
            length = task_feature_lengths[name]
            there = tf.sequence_mask(tf.size(tokens), length)
            row[f"{prefix}tokens"] = self._fill_up(tokens, length)
            row[f"{prefix}segment_ids"] = tf.cast(there, tf.int32)
            row[f"{prefix}positions"] = tf.where(there, tf.range(length), 0)
        return row | {"target_mask": row["segment_ids"] > 0}

    def _pack_rows(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        names = ("inputs", "targets")

        # SeqIO's packing takes a zero for padding, whatever it means, and numbers the segments of each feature for
        # itself, without those that are empty: sizes go along, and tell which inputs and targets are one example's.
        def encode(features: Features) -> Features:
            sizes = {f"{name}_size": 1 + tf.size(features[name], tf.int32)[None] for name in names}
            return {name: 1 + features[name] for name in names} | sizes

        def decode(packed: Features) -> Features:
            row = {}
            for prefix, name in (("encoder_", "inputs"), ("", "targets")):
                there, length = packed[name] > 0, task_feature_lengths[name]
                sizes = tf.maximum(packed[f"{name}_size"] - 1, 0)
                segment_ids = tf.repeat(tf.range(1, tf.size(sizes) + 1), sizes)
                row[f"{prefix}tokens"] = tf.where(there, packed[name] - 1, self._pad_id)
                row[f"{prefix}segment_ids"] = self._fill_up(segment_ids, length, 0)
                row[f"{prefix}positions"] = packed[f"{name}_positions"]
            return row | {"target_mask": packed["targets"] > 0}

        ds = ds.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
        lengths = {name: task_feature_lengths[name] for name in names}
        ds = self._pack_or_pad(ds, lengths | {f"{name}_size": sum(lengths.values()) for name in names})
        return ds.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
