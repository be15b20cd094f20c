r"""Write answers to prompts: diffusion-t5x generate --checkpoint DIR [--prompt TEXT]

DIR is a MODEL_DIR, a checkpoint or a folder that `convert` wrote. Model, vocabulary, lengths and decoder come from the
checkpoint; gin files and --gin.NAME=VALUE change them.

  --prompt TEXT   write one answer and stop. Without it, a terminal asks for one prompt after another (an empty line or
                  Ctrl-D ends, Ctrl-C stops an answer), and a pipe gives one prompt per line and gets one answer per
                  line, in which \n is a line break and \\ a backslash
  --length N      maximum number of tokens to write; for diffusion, the canvas
  --samples N     answers to each prompt
  --seed N        random seed
  --regex PATTERN
                  answers are texts of this regular expression
  --json_schema FILE
                  answers are JSON of this schema
  --tokenizer FILE
                  the vocabulary's file, if the checkpoint does not name it or it has moved
"""

import sys
from collections.abc import Mapping, Sequence

import jax

from diffusion_t5x.chat.answers import Answers
from diffusion_t5x.chat.conversation import Plain, Terminal, ended_by_signals, say
from diffusion_t5x.chat.live_canvas import LiveCanvas
from diffusion_t5x.chat.prompts import Prompts, prompt_lengths
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.recorded import gin_text
from diffusion_t5x.command_line.verbs import own_flags
from diffusion_t5x.console import Console
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.structured import language_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.agreement import Agreement

# Read before what the checkpoint says, which sets the macros.
_GIN = """\
from __gin__ import dynamic_registration

from diffusion_t5x import generate

MIXTURE_OR_TASK_NAME = None
TASK_FEATURE_LENGTHS = None
CONTEXT_EOS = None
VOCABULARY = None
VOCABULARY_FILE = None

generate.generate:
  model = %MODEL
  decoder = %DECODER
  vocabulary = %VOCABULARY
  vocabulary_file = %VOCABULARY_FILE
  context_eos = %CONTEXT_EOS
  task = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
"""


def generate(
    *,
    checkpoint_path: str,
    model: ModelConfig,
    decoder: Decoder,
    vocabulary: "AnyVocabulary | None" = None,
    vocabulary_file: str | None = None,
    context_eos: bool | None = None,
    task: str | None = None,
    task_feature_lengths: Mapping[str, int] | None = None,
    prompt: str | None = None,
    length: int | None = None,
    regex: str | None = None,
    json_schema: str | None = None,
    samples: int = 1,
    random_seed: int = 0,
    allow_mismatch: bool = False,
) -> None:
    """Answers prompts, the decoder's `inputs`, on one device, one row at a time.

    The n-th prompt draws what the n-th example of a task does in `infer`, with the same seed.

    Args:
      checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR.
      model: dimensions of the checkpoint's model.
      decoder: writes the texts.
      vocabulary: the model's vocabulary.
      vocabulary_file: its file, instead of `vocabulary`, see `data.vocabulary_files.vocabulary`.
      context_eos: True to append EOS to a prompt.
      task: the task that supplies what the three settings above leave open. Its preprocessors are not applied. Without
        it, only encoder-decoders get EOS after the prompt.
      task_feature_lengths: maximum numbers of tokens: `inputs` for a prompt, `targets` for an answer. Without `inputs`
        both share the targets' tokens; None: all that the model's `max_length` allows.
      prompt: the only prompt; None reads standard input.
      length: number of tokens to write, instead of the targets' length.
      regex, json_schema: what an answer may be: a regular expression, or the path of a JSON schema; see
        `decoding.structured.language_of`.
      samples: number of answers to each prompt.
      random_seed: seed of the decoder.
      allow_mismatch: use the model other than as it was trained, according to the checkpoint's record.

    Raises:
      UserError: settings that do not fit, or a prompt that is too long.
    """
    checkpoint = checkpoints.open_checkpoint(checkpoint_path)
    Agreement.of(checkpoint, "generate.generate.allow_mismatch", allow_mismatch).check(model, [decoder])
    for name, value in (("length", length), ("samples", samples)):
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")
    max_inputs, length = prompt_lengths(task_feature_lengths, length, model)
    dataset = None if task is None else SeqioDataset(task, task_feature_lengths or {})
    vocabulary = vocabulary or _vocabulary(vocabulary_file, dataset)
    if context_eos is None and dataset:
        context_eos = "inputs" in dataset.task_feature_lengths and dataset.adds_eos("inputs")
    elif context_eos is None:
        context_eos = model.architecture == "encoder_decoder"
    prompts = Prompts(vocabulary, context_eos, max_inputs, length, model.architecture)
    language = language_of(regex, json_schema, vocabulary)
    if language is not None:
        language.check_fits([length], "Give it more tokens: --length.")
        decoder = decoder.within(language)
    mesh = MeshConfig().make(jax.devices()[:1])
    definition, params = load_model(checkpoint, model, token_ids(vocabulary), mesh)

    how = checkpoint.record.trained_by or "imported"
    device = jax.devices()[0].device_kind
    step, size = checkpoint.metadata["step"], definition.num_params()
    say(f"{checkpoint_path}, step {step}, {how}: {size:,} parameters on {device}")
    each = f"{samples} × {length}" if samples > 1 else str(length)
    most = "any number" if max_inputs is None else f"at most {max_inputs}"
    say(f"{decoder}, {each} tokens after {most} of a prompt, seed {random_seed}")
    canvas = None
    if sys.stdout.isatty() and (prompt is not None or sys.stdin.isatty()):
        canvas = LiveCanvas(Console(), prompts.cells, decoder.left_to_right)
    answers = Answers(mesh, definition, params, decoder, random_seed, canvas)
    if canvas is None:
        with ended_by_signals():
            Plain(prompts, answers, samples).run(prompt)
        return
    try:
        Terminal(prompts, answers, samples, canvas).run(prompt)
    except KeyboardInterrupt:
        sys.exit(130)


def _vocabulary(file: str | None, dataset: SeqioDataset | None) -> AnyVocabulary:
    if file is None:
        if dataset is not None:
            return dataset.vocabulary()
        raise UserError(
            "The checkpoint names neither a task nor a vocabulary: give its file, --tokenizer FILE, or the task that "
            "it was trained on, --gin_file=tasks/... --gin.MIXTURE_OR_TASK_NAME=..."
        )
    return vocabulary_files.vocabulary(file)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `generate`."""
    argv = sys.argv[1:] if argv is None else argv
    with config.program():
        flags, rest = own_flags("generate").parse_known_args(argv)
        if flags.checkpoint is None and not {"-h", "--help"} & set(rest):
            raise UserError("No model. Give --checkpoint DIR: a MODEL_DIR, a checkpoint or what convert wrote.")
        texts = {"the settings of generate": _GIN}
        if flags.checkpoint:
            checkpoint = checkpoints.open_checkpoint(flags.checkpoint)
            knows_texts = flags.tokenizer is not None or checkpoint.record.vocabulary_source is not None
            texts[f"the record of {checkpoint}"] = gin_text(checkpoint, with_task=not knows_texts)
    given = {
        "checkpoint_path": flags.checkpoint,
        "prompt": flags.prompt,
        "length": flags.length,
        "regex": flags.regex,
        "json_schema": flags.json_schema,
        "samples": flags.samples,
        "random_seed": flags.seed,
    }
    bindings = [f"--gin.generate.generate.{name}={value!r}" for name, value in given.items() if value is not None]
    if flags.tokenizer is not None:  # then nothing is left for the task to say, which needs SeqIO; gin flags still win
        rest = [f"--gin.VOCABULARY_FILE={flags.tokenizer!r}", "--gin.MIXTURE_OR_TASK_NAME=None", *rest]
    config.run(generate, [*rest, *bindings], texts=texts)


if __name__ == "__main__":
    main()
