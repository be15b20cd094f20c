r"""Write answers to prompts: python -m diffusion_t5x.generate --checkpoint DIR [--prompt TEXT]

DIR is a MODEL_DIR, a checkpoint or what `convert` wrote. Model, vocabulary, lengths and the decoder come from what the
checkpoint says of itself; gin files and --gin.NAME=VALUE change them.

  --prompt TEXT   write one answer and stop. Without it, a terminal asks for one prompt after another (an empty line or
                  Ctrl-D ends, Ctrl-C stops an answer), and a pipe gives a prompt a line and gets an answer a line, in
                  which \n is a line break and \\ a backslash
  --length N      tokens to write at most; for diffusion, the canvas
  --samples N     answers to each prompt
  --seed N        of what is drawn
"""

import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import rich.console

from diffusion_t5x import config
from diffusion_t5x.command_line.verbs import own_flags
from diffusion_t5x.data.prompts import Prompts
from diffusion_t5x.data.seqio_source import SeqioDataset, libraries
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.self_speculation import SelfSpeculationDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import results
from diffusion_t5x.evaluation.answers import Answers
from diffusion_t5x.evaluation.conversation import Plain, Terminal, ended_by_signals, say
from diffusion_t5x.evaluation.live_canvas import LiveCanvas
from diffusion_t5x.evaluation.loading import check_shifted, load_model
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training import checkpoints

if TYPE_CHECKING:
    import seqio

_LENGTH = 256  # of what an imported model writes
# Read before what the checkpoint says, which sets MODEL, and DECODER or what goes with it.
_GIN = """\
from __gin__ import dynamic_registration

from diffusion_t5x import generate

MIXTURE_OR_TASK_NAME = None
TASK_FEATURE_LENGTHS = None
VOCABULARY_FILE = None

generate.generate:
  model = %MODEL
  decoder = %DECODER
  task = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  vocabulary_file = %VOCABULARY_FILE
"""
# The machine's affair, and not what the training's machine had.
_ATTENTION = """\
from __gin__ import dynamic_registration

from diffusion_t5x.models import config as model_config

model_config.ModelConfig.attention_backend = "auto"
"""


def generate(
    *,
    checkpoint_path: str,
    model: ModelConfig,
    decoder: Decoder,
    task: str | None = None,
    task_feature_lengths: Mapping[str, int] | None = None,
    vocabulary_file: str | None = None,
    prompt: str | None = None,
    length: int | None = None,
    samples: int = 1,
    random_seed: int = 0,
) -> None:
    """Answers prompts on one device, one row at a time: what the decoder writes to them as `inputs`.

    The n-th prompt draws what the n-th example of a task does in `infer`, with the same seed.

    Args:
      checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR.
      model: dimensions of the checkpoint's model.
      decoder: what writes.
      task: whose vocabulary it is, and whether inputs end in EOS. Its preprocessors are not applied. None: see
        `vocabulary_file`.
      task_feature_lengths: `inputs`, the most tokens of a prompt, and `targets`, of an answer. Without `inputs` both
        share the targets' tokens; None: all that the model's `max_length` allows.
      vocabulary_file: of a model without task, see `tasks.registration.vocabulary`; where there is no such file, one of
        that name beside the model's checkpoints. Inputs of encoder-decoders end in EOS, others do not.
      prompt: the only one; None reads standard input.
      length: tokens to write, in place of the targets' length.
      samples: answers to each prompt.
      random_seed: of the decoder.

    Raises:
      UserError: anything that does not fit; a prompt that is too long.
    """
    path = checkpoints.find_checkpoint(checkpoint_path)
    metadata = checkpoints.read_metadata(str(path))
    trained_with = metadata.get("config", "")
    check_shifted(results.trained_shifted(trained_with), f"The training of {path}", [decoder])
    for name, value in (("length", length), ("samples", samples)):
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")
    max_inputs, length = _lengths(task_feature_lengths, length, model)
    if task is not None:
        dataset = SeqioDataset(task, task_feature_lengths or {})
        vocabulary = dataset.vocabulary()
        adds_eos = "inputs" in dataset.task_feature_lengths and dataset.adds_eos("inputs")
    else:
        vocabulary = _vocabulary(vocabulary_file, path.parent.parent)
        adds_eos = model.architecture == "encoder_decoder"
    prompts = Prompts(vocabulary, adds_eos, max_inputs, length, model.architecture)
    mesh = MeshConfig().make(jax.devices()[:1])
    definition, params = load_model(str(path), model, token_ids(vocabulary), mesh)

    how = results.training_objective(trained_with) or "imported"
    device = jax.devices()[0].device_kind
    say(f"{checkpoint_path}, step {metadata['step']}, {how}: {definition.num_params():,} parameters on {device}")
    each = f"{samples} × {length}" if samples > 1 else str(length)
    most = "any number" if max_inputs is None else f"at most {max_inputs}"
    say(f"{decoder}, {each} tokens after {most} of a prompt, seed {random_seed}")
    canvas = None
    if sys.stdout.isatty() and (prompt is not None or sys.stdin.isatty()):
        left_to_right = isinstance(decoder, AutoregressiveDecoder | BeamSearchDecoder | SelfSpeculationDecoder)
        canvas = LiveCanvas(rich.console.Console(), prompts.cells, left_to_right)
    answers = Answers(mesh, definition, params, decoder, random_seed, canvas)
    if canvas is None:
        with ended_by_signals():
            Plain(prompts, answers, samples).run(prompt)
        return
    try:
        Terminal(prompts, answers, samples, canvas).run(prompt)
    except KeyboardInterrupt:
        sys.exit(130)


def _lengths(features: Mapping[str, int] | None, length: int | None, model: ModelConfig) -> tuple[int | None, int]:
    """The most tokens of a prompt (None: any number), and those of an answer."""
    is_one_row = model.architecture == "decoder_only"
    if features is not None and not {"targets"} <= features.keys() <= {"inputs", "targets"}:
        raise UserError(f"TASK_FEATURE_LENGTHS must have targets, and may have inputs: {dict(features)}.")
    if features and "inputs" in features:
        most, length = features["inputs"], length or features["targets"]
        model.check_length(most + length if is_one_row else max(most, length), "TASK_FEATURE_LENGTHS or --length")
        return most, length
    most = features["targets"] if features else model.max_length
    if most is None:
        return None, length or _LENGTH
    length = length or min(_LENGTH, most // 2)
    if is_one_row and length >= most:
        raise UserError(f"--length {length} leaves no room for a prompt: the model has {most} tokens for both.")
    return most - length if is_one_row else most, length


def _vocabulary(file: str | None, folder: pathlib.Path) -> "seqio.Vocabulary":
    """The vocabulary of a file that may have been moved together with the model's folder."""
    libraries()
    from diffusion_t5x.tasks import registration

    if file is None:
        raise UserError(
            "The checkpoint names neither a task nor a vocabulary: give its file, --gin.VOCABULARY_FILE=FILE, or the "
            "task that it was trained on, --gin_file=tasks/... --gin.MIXTURE_OR_TASK_NAME=..."
        )
    beside = folder / pathlib.Path(file).name
    is_moved = not pathlib.Path(file).expanduser().exists() and beside.exists()
    return registration.vocabulary(str(beside) if is_moved else file)


def gin_texts(checkpoint_path: str) -> dict[str, str]:
    """What is read before a user's gin files, by what it is: this verb's settings, and what a checkpoint says.

    Raises:
      UserError: no checkpoint, or one whose metadata cannot be read.
    """
    path = checkpoints.find_checkpoint(checkpoint_path)
    try:
        trained_with = checkpoints.read_metadata(str(path)).get("config", "")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: its metadata, which say what model it is, are not there or broken ({error})."
        ) from error
    macros = re.findall(r"^(TOKENIZER_FILE|VOCABULARY_FILE) = ", trained_with, re.MULTILINE)
    return {
        "the settings of generate": _GIN,
        "the decoder": results.decoder_gin(trained_with),
        f"the configuration in {path}": trained_with,
        "the tokenizer": "VOCABULARY_FILE = %TOKENIZER_FILE" if macros == ["TOKENIZER_FILE"] else "",
        "the attention": _ATTENTION,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `generate`."""
    argv = sys.argv[1:] if argv is None else argv
    with config.program():
        flags, rest = own_flags("generate").parse_known_args(argv)
        if flags.checkpoint is None and not {"-h", "--help"} & set(rest):
            raise UserError("Which model? Give --checkpoint DIR: a MODEL_DIR, a checkpoint or what convert wrote.")
        texts = gin_texts(flags.checkpoint) if flags.checkpoint else {}
    given = {
        "checkpoint_path": flags.checkpoint,
        "prompt": flags.prompt,
        "length": flags.length,
        "samples": flags.samples,
        "random_seed": flags.seed,
    }
    bindings = [f"--gin.generate.generate.{name}={value!r}" for name, value in given.items() if value is not None]
    config.run(generate, [*rest, *bindings], texts=texts)


if __name__ == "__main__":
    main()
