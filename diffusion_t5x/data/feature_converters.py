"""From SeqIO's `inputs` and `targets` to the rows of a `Batch`. Imports TensorFlow: import it inside functions."""

from collections.abc import Mapping

import seqio
import tensorflow as tf

Features = Mapping[str, tf.Tensor]


class DecoderOnlyConverter(seqio.FeatureConverter):
    """Rows of clean, unshifted tokens for a decoder-only model: `inputs` (if the task has any), then `targets`.

    Every row is as long as the feature lengths together, and has `tokens`, `target_mask`, `segment_ids` and
    `positions` as in `data.batch.Batch`. Three layouts:

      plain                 inputs, targets, padding
      canvas                inputs, a canvas as long as the targets' length, padding. The canvas holds the targets and,
                            behind them, pad tokens which are targets as well (METHODS: target canvas)
      pack                  plain examples one after another, as many as fit, each a segment of its own

    Args:
      has_inputs: whether the task has a feature `inputs`. Without, every position is a target.
      pack: several examples per row.
      canvas: fill the targets up to their length. Excludes `pack`.
      pad_id: the token that fills up.
    """

    MODEL_FEATURES = {  # noqa: RUF012 (SeqIO's way of declaring them)
        "tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "target_mask": seqio.FeatureConverter.FeatureSpec(dtype=tf.bool),
        "segment_ids": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "positions": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
    }
    PACKING_FEATURE_DTYPES = {}  # noqa: RUF012

    def __init__(self, has_inputs: bool = True, pack: bool = False, canvas: bool = False, pad_id: int = 0):
        names = ("inputs", "targets") if has_inputs else ("targets",)
        self.TASK_FEATURES = {name: seqio.FeatureConverter.FeatureSpec(dtype=tf.int32) for name in names}
        self._canvas = canvas
        self._pad_id = pad_id
        super().__init__(pack=pack, apply_length_check=False)  # costs two passes; the shapes below are static

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        return dict.fromkeys(self.MODEL_FEATURES, sum(task_feature_lengths.values()))

    def convert_example(self, features: Features, task_feature_lengths: Mapping[str, int]) -> Features:
        """One example as one row (the layouts without packing)."""
        length = sum(task_feature_lengths.values())
        tokens, target_mask = self._join(features, task_feature_lengths)
        there = tf.sequence_mask(tf.size(tokens), length)
        padding = [[0, length - tf.size(tokens)]]
        return {
            "tokens": tf.ensure_shape(tf.pad(tokens, padding, constant_values=self._pad_id), [length]),
            "target_mask": tf.ensure_shape(tf.pad(target_mask, padding), [length]),
            "segment_ids": tf.cast(there, tf.int32),
            "positions": tf.where(there, tf.range(length), 0),
        }

    def _join(self, features: Features, task_feature_lengths: Mapping[str, int]) -> tuple[tf.Tensor, tf.Tensor]:
        """The tokens of an example and whether each of them is a target."""
        targets = features["targets"]
        if self._canvas:
            blank = task_feature_lengths["targets"] - tf.size(targets)
            targets = tf.pad(targets, [[0, blank]], constant_values=self._pad_id)
        inputs = features["inputs"] if "inputs" in self.TASK_FEATURES else targets[:0]
        return tf.concat([inputs, targets], 0), tf.concat([tf.zeros_like(inputs), tf.ones_like(targets)], 0) > 0

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        if not self.pack:
            return ds.map(lambda x: self.convert_example(x, task_feature_lengths), num_parallel_calls=tf.data.AUTOTUNE)

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
