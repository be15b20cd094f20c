"""GSM8K and MATH500: problems whose solutions end in an answer, which math-verify compares.

Read from the authors' JSON lines, GSM8K also from TFDS. Needs `pip install diffusion_t5x[math]` to score.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffusion_t5x.evaluation import metrics
from diffusion_t5x.tasks import local_files, readers, registration, sources

if TYPE_CHECKING:
    import tensorflow as tf

GSM8K_TFDS_NAME = "gsm8k:1.0.0"


def gsm8k(
    vocabulary_file: str | None, files: Mapping[str, local_files.Patterns] | None = None, num_shots: int = 0
) -> str:
    """Registers `gsm8k` (arXiv 2110.14168) and returns its name.

    Targets are the published solutions, which end in "#### 42"; the answer of a prediction is the number after its
    first "####", otherwise its last number or formula.

    Args:
      vocabulary_file: see `vocabulary_files.vocabulary`.
      files: JSON lines with `question` and `answer` for each split; None reads TFDS, splits "train" and "test".
      num_shots: see `registration.task`.

    Raises:
      UserError: there is no vocabulary file; on first reading, no data or errors in it.
    """
    templates = {"inputs": "{question}", "targets": "{answer}"}
    found: registration.Source
    if files is None:
        found, prepare = sources.PreparedTfds(GSM8K_TFDS_NAME, {"train": "train", "test": "test"}), [_gsm8k_texts]
    else:
        found, prepare = local_files.source(files, readers.Jsonl(), templates), []
    return _task("gsm8k", found, prepare, vocabulary_file, num_shots)


def math500(vocabulary_file: str | None, files: Mapping[str, local_files.Patterns], num_shots: int = 0) -> str:
    """Registers `math500` (arXiv 2305.20050: 500 of the problems of MATH) and returns its name.

    Targets are the solutions, in LaTeX, with the answer in a \\boxed; predictions are expected in the same form.

    Args:
      vocabulary_file: see `vocabulary_files.vocabulary`.
      files: JSON lines with `problem` and `solution` for each split, as in MATH and MATH500.
      num_shots: see `registration.task`; needs MATH's own training problems as split "train".

    Raises:
      UserError: as `gsm8k`.
    """
    templates = {"inputs": "{problem}", "targets": "{solution}"}
    found = local_files.source(files, readers.Jsonl(), templates)
    return _task("math500", found, [], vocabulary_file, num_shots)


def _task(
    name: str,
    source: registration.Source,
    prepare: list[registration.Preprocessor],
    vocabulary_file: str | None,
    num_shots: int,
) -> str:
    return registration.task(
        name,
        source,
        prepare,
        vocabulary_file,
        num_shots=num_shots,
        metric_fns=[metrics.math_accuracy],
        shuffle_buffer=10_000,
    )


def _gsm8k_texts(dataset: "tf.data.Dataset") -> "tf.data.Dataset":
    return dataset.map(lambda x: {"inputs": x["question"], "targets": x["answer"]})
