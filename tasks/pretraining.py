"""Pretraining documents from TFDS: C4, mC4 and similar. For user files: `local_files.task` with an objective.

Paper 1 (arXiv 2401.17181) mixes 80 % multilingual web text with 20 % Python code: `gin/tasks/c4_code.gin`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffusion_t5x.tasks import registration, sources

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf


def c4(
    vocabulary_file: str | None, objective: registration.Preprocessor, tfds_name: str = "c4/en:3.1.0", name: str = "c4"
) -> str:
    """Registers C4, or any TFDS data set of documents `text` with splits "train" and "validation"; returns its name.

    Args:
      vocabulary_file: see `vocabulary_files.vocabulary`.
      objective: one of the preprocessors in `tasks.preprocessors`.
      tfds_name: name of the data set.
      name: name of the task.

    Raises:
      UserError: there is no vocabulary file; on first reading, no data.
    """
    splits = {"train": "train", "validation": "validation"}
    return _documents(name, tfds_name, splits, vocabulary_file, objective)


def mc4(
    vocabulary_file: str | None,
    objective: registration.Preprocessor,
    languages: Sequence[str],
    temperature: float = 10 / 3,
    tfds_name: str = "c4/multilingual:3.1.0",
) -> str:
    """Registers a task `mc4_<language>` for each language and their mixture `mc4`, and returns the mixture's name.

    Args:
      vocabulary_file: see `vocabulary_files.vocabulary`.
      objective: one of the preprocessors in `tasks.preprocessors`.
      languages: mC4's codes, such as "en".
      temperature: a language's rate is its number of documents to the power of 1 / temperature (mT5, arXiv 2010.11934).
      tfds_name: name of the data set, whose splits are "en", "en-validation" ...

    Raises:
      UserError: there is no vocabulary file; on first reading, no data.
    """

    def rate(task: "seqio.Task") -> float:
        import seqio

        return seqio.mixing_rate_num_examples(task, temperature=temperature)

    tasks = []
    for language in languages:
        splits = {"train": language, "validation": f"{language}-validation"}
        tasks.append((_documents(f"mc4_{language}", tfds_name, splits, vocabulary_file, objective), rate))
    return registration.mixture("mc4", tasks)


def _documents(
    name: str, tfds_name: str, splits: dict[str, str], vocabulary_file: str | None, objective: registration.Preprocessor
) -> str:
    source = sources.PreparedTfds(tfds_name, splits)
    return registration.task(name, source, [_text], vocabulary_file, objective=objective)


def _text(dataset: "tf.data.Dataset") -> "tf.data.Dataset":
    return dataset.map(lambda x: {"targets": x["text"]})
