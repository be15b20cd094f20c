r"""Write answers to prompts: diffusion-t5x generate --checkpoint DIR [--prompt TEXT]

DIR is a MODEL_DIR, a checkpoint or a folder that `convert` wrote. Model, vocabulary, lengths and decoder come from the
checkpoint; gin files and --gin.NAME=VALUE change them.

  --prompt TEXT   write one answer and stop. Without it, a terminal asks for one prompt after another (an empty line or
                  Ctrl-D ends, Ctrl-C stops an answer), and a pipe gives one prompt per line and gets one answer per
                  line, in which \n is a line break and \\ a backslash
  --length N      maximum number of tokens to write; for diffusion, the canvas
  --samples N     answers to each prompt
  --seed N        random seed
  --chat, --no-chat
                  format prompts with the chat template that comes with the tokenizer, or leave them as they are.
                  Without either, a template is used if the model may have learned it. In a terminal, a chat is one
                  conversation (/help lists its commands); in a pipe, each line begins a conversation of its own
  --system TEXT   system prompt of a chat
  --stop TEXT     end answers before this text; repeatable
  --regex PATTERN
                  answers are texts of this regular expression
  --json_schema FILE
                  answers are JSON of this schema
  --tokenizer FILE
                  the vocabulary's file, if the checkpoint does not name it or it has moved
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from diffusion_t5x.chat.answers import Answers
from diffusion_t5x.chat.conversation import Plain, Terminal, ended_by_signals, say
from diffusion_t5x.chat.live_canvas import LiveCanvas
from diffusion_t5x.chat.opening import about, adds_eos, open_vocabulary
from diffusion_t5x.chat.prompts import Prompts, prompt_lengths
from diffusion_t5x.chat.talk import Talk
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.command_line import answering
from diffusion_t5x.console import Console
from diffusion_t5x.data import stop_strings
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.structured import language_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.agreement import Agreement


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
    chat: bool | None = None,
    system: str | None = None,
    stop: Sequence[str] = (),
    template_variables: Mapping[str, Any] | None = None,
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
      chat: format prompts with the chat template beside the vocabulary. None does so if there is one and the checkpoint
        does not say that the model was trained on something else.
      system: the system prompt of a chat.
      stop: strings before which an answer ends.
      template_variables: other variables of the chat template, such as {"enable_thinking": False}.
      allow_mismatch: use the model other than as it was trained, according to the checkpoint's record.

    Raises:
      UserError: settings that do not fit, or a prompt that is too long.
    """
    checkpoint = checkpoints.open_checkpoint(checkpoint_path)
    Agreement.of(checkpoint, "generate.generate.allow_mismatch", allow_mismatch).check(model, [decoder])
    for name, value in (("length", length), ("samples", samples)):
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")
    stops = stop_strings.check(stop, "--stop")
    max_inputs, length = prompt_lengths(task_feature_lengths, length, model)
    dataset = None if task is None else SeqioDataset(task, task_feature_lengths or {})
    vocabulary = open_vocabulary(vocabulary, vocabulary_file, dataset)
    template = _chat(checkpoint, vocabulary, template_variables, chat, system)
    ends = not template and adds_eos(context_eos, dataset, model)  # a chat template ends turns in its own way
    prompts = Prompts(vocabulary, ends, max_inputs, length, model.architecture, template, system, stops)
    decoder = _within(decoder, regex, json_schema, prompts)
    mesh = MeshConfig().make(jax.devices()[:1])
    ids = dataclasses.replace(token_ids(vocabulary), end_ids=prompts.end_ids)
    definition, params = load_model(checkpoint, model, ids, mesh)

    _say_settings(checkpoint, definition, decoder, prompts, samples, random_seed)
    canvas = None
    if sys.stdout.isatty() and (prompt is not None or sys.stdin.isatty()):
        canvas = LiveCanvas(Console(), prompts.cells, decoder.left_to_right)
    is_enough = prompts.is_enough if stops else None
    answers = Answers(mesh, definition, params, decoder, random_seed, canvas, is_enough)
    _answer(prompts, answers, samples, canvas, prompt)


def _answer(prompts: Prompts, answers: Answers, samples: int, canvas: LiveCanvas | None, prompt: str | None) -> None:
    """Answers one prompt, or all of standard input: in a terminal on a canvas, otherwise line by line."""
    if canvas is None:
        with ended_by_signals():
            Plain(prompts, answers, samples).run(prompt)
        return
    try:
        (Talk if prompts.chat else Terminal)(prompts, answers, samples, canvas).run(prompt)
    except KeyboardInterrupt:
        sys.exit(130)


def _say_settings(
    checkpoint: OpenCheckpoint,
    definition: ModelDefinition,
    decoder: Decoder,
    prompts: Prompts,
    samples: int,
    random_seed: int,
) -> None:
    say(about(checkpoint, definition))
    each = f"{samples} × {prompts.length}" if samples > 1 else str(prompts.length)
    most = "any number" if prompts.max_inputs is None else f"at most {prompts.max_inputs}"
    chat = ", chat" if prompts.chat else ""
    say(f"{decoder}, {each} tokens after {most} of a prompt, seed {random_seed}{chat}")


def _within(decoder: Decoder, regex: str | None, json_schema: str | None, prompts: Prompts) -> Decoder:
    """Returns the decoder, writing only what an answer may be."""
    language = language_of(regex, json_schema, prompts.vocabulary, end_ids=prompts.end_ids)
    if language is None:
        return decoder
    if prompts.stops:
        raise UserError("--stop would cut the text that --regex or --json_schema asks for: leave it out.")
    language.check_fits([prompts.length], "Give it more tokens: --length.")
    return decoder.within(language)


def _chat(
    checkpoint: OpenCheckpoint,
    vocabulary: AnyVocabulary,
    variables: Mapping[str, Any] | None,
    wanted: bool | None,
    system: str | None,
) -> Chat | None:
    """Returns the chat format to use; None to leave prompts as they are."""
    is_asked_for = wanted or system is not None
    if wanted is False and system is not None:
        raise UserError("--system is for a chat: leave out --no-chat.")
    if wanted is False or not (is_asked_for or checkpoint.record.may_chat):
        return None
    chat = Chat.of(vocabulary, variables)
    if is_asked_for and chat is None:
        raise UserError(
            f"{checkpoint} has no chat template: there is neither chat_template.jinja nor a chat_template in "
            "tokenizer_config.json beside a tokenizer.json. Leave out --chat and --system."
        )
    return chat


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `generate`."""
    names = ("prompt", "length", "regex", "json_schema", "samples", "chat", "system", "stop")
    answering.run(generate, argv, {**{name: name for name in names}, "seed": "random_seed"})


if __name__ == "__main__":
    main()
