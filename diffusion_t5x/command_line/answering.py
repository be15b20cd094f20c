"""Runs verbs that answer prompts: a checkpoint is all that they need."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.recorded import gin_text
from diffusion_t5x.command_line.verbs import own_flags
from diffusion_t5x.errors import UserError

# Read before what the checkpoint says, which sets the macros.
_GIN = """\
from __gin__ import dynamic_registration

from diffusion_t5x import {verb}

MIXTURE_OR_TASK_NAME = None
TASK_FEATURE_LENGTHS = None
CONTEXT_EOS = None
VOCABULARY = None
VOCABULARY_FILE = None
TEMPLATE_VARIABLES = None

{verb}.{verb}:
  model = %MODEL
  decoder = %DECODER
  vocabulary = %VOCABULARY
  vocabulary_file = %VOCABULARY_FILE
  context_eos = %CONTEXT_EOS
  task = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  template_variables = %TEMPLATE_VARIABLES
"""


def run(function: Callable[..., None], argv: Sequence[str] | None, arguments: Mapping[str, str]) -> None:
    """Runs a verb with the settings of the checkpoint that its flags name.

    Args:
      function: the verb's function; its name is the verb.
      argv: the command line; None takes that of this process.
      arguments: the function's arguments, by the names of the verb's own flags. --checkpoint and --tokenizer are known.
    """
    verb = function.__name__
    argv = sys.argv[1:] if argv is None else argv
    with config.program():
        flags, rest = own_flags(verb).parse_known_args(argv)
        if flags.checkpoint is None and not {"-h", "--help"} & set(rest):
            raise UserError("No model. Give --checkpoint DIR: a MODEL_DIR, a checkpoint or what convert wrote.")
        texts = {f"the settings of {verb}": _GIN.format(verb=verb)}
        if flags.checkpoint:
            checkpoint = checkpoints.open_checkpoint(flags.checkpoint)
            knows_texts = flags.tokenizer is not None or checkpoint.record.vocabulary_source is not None
            texts[f"the record of {checkpoint}"] = gin_text(checkpoint, with_task=not knows_texts)
    given: dict[str, Any] = {name: getattr(flags, flag) for flag, name in arguments.items()}
    given["checkpoint_path"] = flags.checkpoint
    bindings = [f"--gin.{verb}.{verb}.{name}={value!r}" for name, value in given.items() if value is not None]
    if flags.tokenizer is not None:  # then nothing is left for the task to say, which needs SeqIO; gin flags still win
        rest = [f"--gin.VOCABULARY_FILE={flags.tokenizer!r}", "--gin.MIXTURE_OR_TASK_NAME=None", *rest]
    config.run(function, [*rest, *bindings], texts=texts)
