"""Translation in T5's format, "translate English to French: ...", from TFDS.

Parallel text and TSV files need no module of their own: see `gin/tasks/local_parallel.gin` and `tatoeba_enfr.gin`.
"""

import functools
from typing import TYPE_CHECKING

from diffusion_t5x.evaluation import metrics
from diffusion_t5x.tasks import registration, sources

if TYPE_CHECKING:
    import tensorflow as tf


def wmt14(
    vocabulary_file: str | None,
    source_language: str = "en",
    target_language: str = "fr",
    tfds_name: str = "wmt14_translate/fr-en:1.0.0",
    num_shots: int = 0,
) -> str:
    """Registers WMT14, `wmt14_enfr` or the reverse `wmt14_fren`, and returns its name.

    Its splits are "train" (news commentary, Europarl, Common Crawl, UN and Gigaword; for En-Fr 40.8 million pairs),
    "validation" (newstest2013) and "test" (newstest2014). BLEU is sacrebleu's.

    Args:
      vocabulary_file: see `vocabulary_files.vocabulary`.
      source_language, target_language: codes of the TFDS data set's two languages.
      tfds_name: name of any TFDS data set of translations with these splits.
      num_shots: see `registration.task`.

    Raises:
      UserError: there is no vocabulary file; on first reading, no data.
    """
    return registration.task(
        f"wmt14_{source_language}{target_language}",
        sources.PreparedTfds(tfds_name, {split: split for split in ("train", "validation", "test")}),
        [functools.partial(_translate, source_language=source_language, target_language=target_language)],
        vocabulary_file,
        num_shots=num_shots,
        metric_fns=[metrics.bleu],
    )


def _translate(dataset: "tf.data.Dataset", source_language: str, target_language: str) -> "tf.data.Dataset":
    """t5's preprocessor."""
    from t5.data.preprocessors import translate

    return translate(dataset, source_language=source_language, target_language=target_language)
