"""SQuAD v1.1 in T5's format, "question: ... context: ...", from TFDS or JSON in its official form."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_t5x.data import text_files
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import metrics
from diffusion_t5x.tasks import registration, sources

if TYPE_CHECKING:
    import tensorflow as tf

TFDS_NAME = "squad/v1.1:3.0.0"


def squad(
    vocabulary_file: str | None,
    files: Mapping[str, text_files.Patterns] | None = None,
    name: str = "squad",
    num_shots: int = 0,
) -> str:
    """Registers SQuAD and returns the task's name.

    The text is t5's: a space on either side of each punctuation mark, also in answers. The target is the first answer;
    the metric takes the best of all. A context that does not fit is cut at its end.

    Args:
      vocabulary_file: see `vocabulary_files.vocabulary`.
      files: paths or glob patterns for each split, of JSON (also .gz) in SQuAD's format; None reads TFDS, splits
        "train" and "validation".
      name: name of the task.
      num_shots: see `registration.task`.

    Raises:
      UserError: there is no vocabulary file; on first reading, no data, or a file in another format.
    """
    found: registration.Source
    if files is None:
        found, prepare = sources.PreparedTfds(TFDS_NAME, {"train": "train", "validation": "validation"}), []
    else:
        files = text_files.by_split(files, "SQUAD_FILES")
        list_files = lambda split: text_files.expand(files[split])  # noqa: E731
        found = sources.Records(lambda split: _read_all(files[split]), list(files), list_files)
        prepare = [_as_in_tfds]
    return registration.task(
        name,
        found,
        [*prepare, _question_and_context],
        vocabulary_file,
        num_shots=num_shots,
        metric_fns=[metrics.squad],
        postprocess_fn=_answers,
        shuffle_buffer=10_000 if files is None else 1,  # TFDS keeps an article's questions together
    )


def _as_in_tfds(dataset: "tf.data.Dataset") -> "tf.data.Dataset":
    return dataset.map(lambda x: x | {"answers": {"text": x["answers"]}})


def _question_and_context(dataset: "tf.data.Dataset") -> "tf.data.Dataset":
    """Applies t5's preprocessor, without its second copy of the context."""
    from t5.data.preprocessors import squad as preprocess

    names = ("inputs", "targets", "id", "answers")
    return preprocess(dataset).map(lambda x: {name: x[name] for name in names})


def _answers(answer: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> Any:
    """t5's postprocessor."""
    from t5.data.postprocessors import qa

    return qa(answer, example, is_target)


def read(file: str) -> list[dict[str, Any]]:
    """Returns the questions in a file, each with its `id`, `question`, `context` and `answers` (texts).

    Raises:
      UserError: there is no such file, it has another format or no questions, or a question has no answer.
    """
    value = text_files.json_value(file)
    if value is None:
        raise UserError(f"{file} is empty.")
    try:
        questions = [
            {"id": _text(qa["id"]), "question": _text(qa["question"]), "context": _text(paragraph["context"])}
            | {"answers": [_text(answer["text"]) for answer in qa["answers"]]}
            for article in value["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is not in SQuAD's format: {type(error).__name__} {error}.") from error
    if not questions:
        raise UserError(f"{file} has no questions.")
    if unanswered := sum(not question["answers"] for question in questions):
        raise UserError(f"{file}: {unanswered} questions have no answer; SQuAD v1.1 has one for each.")
    return questions


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{json.dumps(value)[:40]} is not text")
    return value


def _read_all(patterns: text_files.Patterns) -> list[dict[str, Any]]:
    return [question for file in text_files.expand(patterns) for question in read(file)]
