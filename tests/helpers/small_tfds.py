"""Small data sets in the place and layout of TFDS' real ones; fixture `tfds_folder` says where."""

import pathlib
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

TEXT = tfds.features.Text()
SQUAD_FEATURES = {name: TEXT for name in ("id", "title", "context", "question")} | {
    "answers": tfds.features.Sequence({"text": TEXT, "answer_start": tf.int32})
}


def prepare(
    folder: pathlib.Path,
    name: str,
    config: str | None,
    version: str,
    features: Mapping[str, Any],
    splits: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes a data set with one record in each split."""
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name, config=config, version=version, data_dir=folder, features=tfds.features.FeaturesDict(features),
        split_datasets={split: tf.data.Dataset.from_tensors(record) for split, record in splits.items()},
    )  # fmt: skip
