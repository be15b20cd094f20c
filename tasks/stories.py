"""Prompts for a model imported from llama2.c, whose tokenizer and whose prompts are files of yours."""

import pathlib

import seqio
import tensorflow as tf

from diffusion_t5x.data.llama2c_vocabulary import Llama2cVocabulary
from diffusion_t5x.errors import UserError

TASK = "stories_prompts"


def prompts(tokenizer_file: str, text_file: str) -> str:
    """Registers the SeqIO task `stories_prompts`, in place of an earlier one, and returns its name.

    Its split `test` has an example for each line of the text file: the line is the input, without EOS, so that the
    model goes on with it; the target is empty. An empty line asks for a text from its beginning.

    Args:
      tokenizer_file: llama2.c's.
      text_file: UTF-8, a prompt a line.

    Raises:
      UserError: a file that cannot be read.
    """
    try:
        lines = pathlib.Path(text_file).expanduser().read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the prompts in {text_file}: {error}.") from error

    def examples(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices({"inputs": lines, "targets": [""] * len(lines)})

    feature = seqio.Feature(Llama2cVocabulary(tokenizer_file), add_eos=False)
    if TASK in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(TASK)
    seqio.TaskRegistry.add(
        TASK,
        source=seqio.FunctionDataSource(examples, ("test",)),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features={"inputs": feature, "targets": feature},
    )
    return TASK
