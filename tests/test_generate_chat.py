"""`generate` in a model's chat template: in a pipe, in several turns, with stop strings and what ends a turn."""

import dataclasses
import io
import re
import sys

import chats
import jax
import open_models
import pytest
import rich.console
import tiny
from chats import message

from diffusion_t5x import generate
from diffusion_t5x.chat.answers import Answers
from diffusion_t5x.chat.conversation import one_line
from diffusion_t5x.chat.live_canvas import LiveCanvas
from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.chat.talk import Talk
from diffusion_t5x.convert import convert
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.data.vocabularies import to_text, token_ids
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.partitioning import MeshConfig

pytest.importorskip("seqio")

SIZE = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "scan_unroll": 1}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A random Qwen2 with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    chats.save(folder / "model", "chatml")
    open_models.write_qwen2(folder / "model")
    convert(["from_hf", str(folder / "model"), "--output", str(folder / "imported")])
    return folder / "imported"


@pytest.fixture
def ask(imported, monkeypatch, capsys):
    """Runs the verb with lines on standard input; returns standard output and standard error."""

    def ask(*flags, lines=()):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        generate.main(["--checkpoint", str(imported), "--length", "12", *flags])
        return capsys.readouterr()

    return ask


def test_the_template_is_used_unless_told_otherwise(imported, ask):
    chat = Chat.of(vocabulary_files.vocabulary(str(imported / "tokenizer.json")))
    rendered = chat.template.render([message("system", "Be brief."), message("user", "the a?")], True)
    in_chat, plain = ask("--system", "Be brief.", lines=["the a?"]), ask("--no-chat", "--prompt", rendered)
    assert ", chat\n" in in_chat.err and ", chat\n" not in plain.err
    assert in_chat.out == one_line(plain.out.removesuffix("\n")) + "\n" != "\n"
    rendered = chat.template.render([message("user", "the a?")], True)
    assert ask("--prompt", "the a?").out == ask("--no-chat", "--prompt", rendered).out


def test_stop_strings_end_answers_and_their_decoding(ask):
    """A decoder that writes in order stops with the piece that completes the string, here after every fourth token."""
    said = ask("--prompt", "the a?")
    whole = said.out.removesuffix("\n")
    assert len(whole) > 4
    stopped = ask("--prompt", "the a?", "--stop", whole[3:5], "--stop", "no such text")
    cut = stopped.out.removesuffix("\n")
    assert cut == whole[: whole.index(whole[3:5])] != whole
    steps, fewer = (int(re.search(r"(\d+) pass(es)? of the model", x.err)[1]) for x in (said, stopped))
    assert fewer < steps and fewer % 4 == 0
    again = ask("--prompt", "the a?", "--stop", "no such text")
    assert again.out.removesuffix("\n") == whole and f"{steps} passes of the model" in again.err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--no-chat", "--system", "x"], "--system is for a chat: leave out --no-chat"),
        (["--stop", ""], "--stop takes texts of at least one character"),
        (["--prompt", "the a? " * 100], r"The conversation is too long: with the chat template it has \d+ tokens"),
    ],
)
def test_mistakes(flags, reason, ask, capsys):
    with pytest.raises(SystemExit):
        ask("--prompt", "a", *flags)
    assert re.search(reason, capsys.readouterr().err)


def test_a_model_without_a_template_is_no_chat_model(tmp_path, capsys):
    folder = tmp_path / "model"
    open_models.save_tokenizer(folder, open_models.byte_level(), eos_token="<|end|>", pad_token="<|pad|>")
    open_models.write_qwen2(folder)
    convert(["from_hf", str(folder), "--output", str(tmp_path / "imported")])
    with pytest.raises(SystemExit):
        generate.main(["--checkpoint", str(tmp_path / "imported"), "--chat", "--prompt", "a"])
    assert "has no chat template" in capsys.readouterr().err


@pytest.fixture
def talk(tmp_path):
    """A conversation with a random model in a terminal."""
    vocabulary = vocabulary_files.vocabulary(chats.save(tmp_path, "turns"))
    chat = Chat.of(vocabulary)
    prompts = Prompts(vocabulary, False, 96, 8, "decoder_only", chat)
    ids = dataclasses.replace(token_ids(vocabulary), end_ids=chat.end_ids)
    definition = ModelDefinition(ModelConfig(**SIZE), ids)
    params = tiny.random_params(definition)
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    canvas = LiveCanvas(console, prompts.cells, True)
    answers = Answers(MeshConfig().make(jax.devices()[:1]), definition, params, AutoregressiveDecoder(), 0, canvas)
    return Talk(prompts, answers, 1, canvas)


def test_turns_and_commands(talk, monkeypatch, capsys):
    """Each answer is that of a conversation written out by hand."""

    def answer(*said):
        messages = [message(("user", "assistant")[number % 2], text) for number, text in enumerate(said)]
        return talk.prompts.to_text(talk.answers.write(talk.prompts.answering(messages, 0)).tokens)

    first = answer("one two")
    second = answer("one two", first, "no")
    lines = ["one two", "no", "/retry", "/undo", "/edit th", "//undo", "/what", "/reset", "/undo", "one two", "x" * 99]
    typed = iter([*lines, "/help", "/system", "/system Be brief.", "no", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    talk.run(None)
    written = capsys.readouterr()
    edited = answer("th")
    expected = [first, second, second, edited, answer("th", edited, "/undo"), first]
    assert written.out.split("\n")[:-1] == "\n".join(expected).split("\n")
    said = [line for line in written.err.splitlines() if " passes of the model" not in line]
    assert said[:3] == [
        "A conversation: the model sees every turn. /help lists the commands.",
        "Taken back: no",
        "There is no command /what. /help lists them.",
    ]
    assert said[3:5] == ["A new conversation.", "/undo needs a message that was answered."]
    assert said[5].startswith("The conversation is too long")
    assert said[6].startswith("/help ") and "There is no system prompt." in said
    # This template takes no system prompt; what is refused leaves the conversation as it was.
    assert said[-2:] == [
        "The system prompt: Be brief.",
        "The conversation is refused: the chat template refuses it: There is no system here.",
    ]


@pytest.mark.parametrize(
    "decoder",
    [pytest.param(AutoregressiveDecoder(), marks=pytest.mark.slow), MaskedDecoder(num_steps=4)],
    ids=["left to right", "masked"],
)
def test_what_ends_a_turn_ends_the_text(decoder, tmp_path):
    """As Gemma's, which is not EOS. Whatever token it is, what follows it is dropped."""
    vocabulary = vocabulary_files.vocabulary(chats.save(tmp_path, "turns"))
    ids = token_ids(vocabulary)
    definition = ModelDefinition(ModelConfig(**SIZE), ids)
    params = tiny.random_params(definition)
    batch = tiny.one_a_row([(vocabulary.encode("the a"), [ids.pad_id] * 8)])

    def write(definition):
        decoded = decoder.decode(definition.bind(params), batch, jax.random.key(0))
        return decoded.tokens[0][batch.target_mask[0]].tolist(), int(decoded.num_tokens[0])

    whole, size = write(definition)
    end = whole[size // 2]
    place = whole.index(end)
    assert end not in (ids.eos_id, ids.pad_id) and size > place + 1
    cut, size = write(dataclasses.replace(definition, vocabulary=dataclasses.replace(ids, end_ids=(end,))))
    assert size == place + 1 and cut == whole[: place + 1] + [ids.pad_id] * (8 - size)
    assert to_text(vocabulary, cut, (end,)) == vocabulary.decode(whole[:place])
