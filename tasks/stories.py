"""Prompts and texts for a model imported from llama2.c, with your own tokenizer and text files."""

import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffusion_t5x.data import text_files
from diffusion_t5x.data.llama2c_vocabulary import Llama2cVocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import metrics
from diffusion_t5x.tasks import preprocessors, readers, registration

if TYPE_CHECKING:
    import tensorflow as tf

logger = logging.getLogger(__name__)

TASK = "stories_prompts"
CONTINUATIONS = "stories_continuations"


def prompts(tokenizer_file: str, text_file: str) -> str:
    """Registers the SeqIO task `stories_prompts`, replacing any earlier one, and returns its name.

    Its split `test` has an example for each line of the text file: the line is the input, without EOS, so that the
    model continues it; the target is empty. An empty line asks for a text from its beginning.

    Args:
      tokenizer_file: llama2.c's.
      text_file: UTF-8, one prompt per line.

    Raises:
      UserError: a file cannot be read.
    """
    lines = re.sub("\r\n?", "\n", text_files.text(text_file)).removesuffix("\n").split("\n")

    def examples(split: str, shuffle_files: bool, seed: int | None = None) -> "tf.data.Dataset":
        import tensorflow as tf

        del split, shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices({"inputs": lines, "targets": [""] * len(lines)})

    return _register(TASK, examples, ("test",), Llama2cVocabulary(tokenizer_file), preprocessors.tokenize)


def continuations(
    tokenizer_file: str, samples_file: str, prompt_tokens: int = 16, num_validation: int = 64, num_test: int = 256
) -> str:
    """Registers the SeqIO task `stories_continuations`, replacing any earlier one, and returns its name.

    The texts are predictions that `diffusion_t5x.infer` wrote. The first tokens of each text are the input, the rest is
    the target, without EOS. The first texts are the split `test`, the next `validation`, and all others `train`, except
    those that begin with a prompt of the former. The metric is `distinct_n`.

    Args:
      tokenizer_file: llama2.c's.
      samples_file: JSON lines with a field "prediction".
      prompt_tokens: number of tokens of a text that are the input.
      num_validation, num_test: numbers of texts in these splits.

    Raises:
      UserError: a file cannot be read, or has too few texts.
    """
    vocabulary = Llama2cVocabulary(tokenizer_file)
    lines = readers.Jsonl().read(text_files.expand(samples_file))
    predictions = readers.Records(lines.size, lambda i: _prediction(lines.parse(i)), lines.where)
    texts = [tokens for tokens in map(vocabulary.encode, predictions) if len(tokens) > prompt_tokens]
    if short := len(predictions) - len(texts):
        logger.info("%s: %d of %d texts are too short and are left out", samples_file, short, len(predictions))
    num_held = num_test + num_validation
    if len(texts) <= num_held:
        raise UserError(
            f"{samples_file} has {len(texts)} texts of over {prompt_tokens} tokens; {num_held} are held out."
        )
    held, rest = texts[:num_held], texts[num_held:]
    prompts_held = {tuple(text[:prompt_tokens]) for text in held}
    rest = [text for text in rest if tuple(text[:prompt_tokens]) not in prompts_held]
    splits = {"test": held[:num_test], "validation": held[num_test:], "train": rest}

    def examples(split: str, shuffle_files: bool, seed: int | None = None) -> "tf.data.Dataset":
        import tensorflow as tf

        del shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices(tf.ragged.constant(splits[split], tf.int32))

    def split_prompt(dataset: "tf.data.Dataset") -> "tf.data.Dataset":
        return dataset.map(lambda text: {"inputs": text[:prompt_tokens], "targets": text[prompt_tokens:]})

    return _register(CONTINUATIONS, examples, tuple(splits), vocabulary, split_prompt, metric_fns=[metrics.distinct_n])


def _prediction(record: readers.Fields) -> str:
    if not isinstance(record.get("prediction"), str):
        raise ValueError('no "prediction", which is text.')
    return record["prediction"]


def _register(
    name: str,
    examples: Callable[..., Any],
    splits: tuple[str, ...],
    vocabulary: Llama2cVocabulary,
    preprocessor: registration.Preprocessor,
    **fields: Any,
) -> str:
    def make() -> dict[str, Any]:
        import seqio

        feature = seqio.Feature(vocabulary, add_eos=False)
        return {
            "source": seqio.FunctionDataSource(examples, splits),
            "preprocessors": [preprocessor],
            "output_features": {"inputs": feature, "targets": feature},
            **fields,
        }

    return registration.add(name, make)
