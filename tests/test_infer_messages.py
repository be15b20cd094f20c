"""`infer --messages`: the answers are those of `generate` and of the decoder, from JSON lines and from Parquet."""

import dataclasses
import json

import chats
import open_models
import pytest
from chats import message

from diffusion_t5x import infer
from diffusion_t5x.api import load
from diffusion_t5x.convert import convert
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.errors import UserError

pytest.importorskip("seqio")
pa = pytest.importorskip("pyarrow")

TALKS = [
    {"messages": [message("user", "the a?"), message("assistant", "it is")]},
    {"messages": [message("user", "the a?"), message("assistant", "one"), message("user", "no")]},
]
LENGTHS = '--gin.TASK_FEATURE_LENGTHS={"inputs": 96, "targets": 12}'


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("messages")
    chats.save(folder / "model", "chatml")
    open_models.write_qwen2(folder / "model")
    convert(["from_hf", str(folder / "model"), "--output", str(folder / "imported")])
    return folder / "imported"


def run(imported, file, out, *flags):
    infer.main(
        ["--checkpoint", str(imported), "--messages", str(file), LENGTHS, f"--gin.INFER_OUTPUT_DIR={out}", *flags]
    )
    return [json.loads(line) for line in (out / f"{file.stem}-answers.jsonl").read_text().splitlines()]


def test_answers_to_the_last_user_turn(imported, tmp_path):
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    parquet.write_table(pa.Table.from_pylist(TALKS), tmp_path / "b.parquet")
    found = run(imported, tmp_path / "a.jsonl", tmp_path / "out", "--gin.BATCH_SIZE=2")
    model = load(str(imported))
    chat = Chat.of(model.tokenizer)
    asked = [TALKS[0]["messages"][:1], TALKS[1]["messages"]]
    for record, messages, answer in zip(found, asked, ["it is", ""], strict=True):
        rendered = chat.template.render(messages, True)
        assert (record["inputs_pretokenized"], record["targets_pretokenized"]) == (rendered, answer)
        assert record["prediction"] == model.generate(rendered, length=12) != ""
    assert [record["example_id"] for record in found] == [0, 1]
    stop = found[0]["prediction"][2]
    cut = run(imported, tmp_path / "b.parquet", tmp_path / "out", "--gin.BATCH_SIZE=2", f"--gin.STOP=({stop!r},)")
    assert [r["prediction"] for r in cut] == [r["prediction"].partition(stop)[0] for r in found]
    assert [r["inputs_pretokenized"] for r in cut] == [r["inputs_pretokenized"] for r in found]


def test_chat_of_the_python_interface_writes_the_same(imported, tmp_path):
    talks = [talk["messages"][: 3 - 2 * (number == 0)] for number, talk in enumerate(TALKS)]
    parts = [message("user", [{"type": "text", "text": "the "}, {"type": "text", "text": "a?"}])]
    lines = [{"messages": talk} for talk in (*talks, parts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sampled = "--gin.AutoregressiveDecoder.temperature=1.0"
    found = run(imported, tmp_path / "a.jsonl", tmp_path / "out", "--gin.BATCH_SIZE=2", sampled)
    model = load(str(imported))
    decoder = dataclasses.replace(model.decoder, temperature=1.0)
    expected = [record["prediction"] for record in found]
    assert model.chat([*talks, parts], decoder=decoder, length=12) == expected and len({*expected}) == 3
    assert model.chat(talks[0], decoder=decoder, length=12) == expected[0]
    stop = expected[0][2]
    assert model.chat(talks[0], decoder=decoder, length=12, stop=[stop]) == expected[0].partition(stop)[0]
    two = model.chat(talks[0], decoder=decoder, length=12, samples=2)
    assert two[0] == expected[0] != two[1]
    with pytest.raises(UserError, match="The conversation is refused: message 1 has the role null"):
        model.chat([{"content": "a"}])
    for wrong, said in (([], "has no messages"), ([[]], "has no messages"), ({}, "must be a list"), ("a", "must be a")):
        with pytest.raises(UserError, match=said):
            model.chat(wrong)
    with pytest.raises(UserError, match="cannot have messages"):
        model.chat(talks[0], template_variables={"messages": []})


@pytest.mark.parametrize(
    ("messages", "flags", "reason"),
    [
        ([message("user", "the a? " * 30)], [], r"a.jsonl:1: the conversation has "),
        ([message("system", "a")], [], "apart from the answer, its last turn is not the user's"),
        ([message("user", "a")], ["--templates", "b.jsonl"], "--messages and --templates exclude each other"),
        ([message("user", "a")], ["--gin.STOP=('',)"], "STOP takes texts of at least one character"),
    ],
)
def test_mistakes_are_told_before_the_first_answer(messages, flags, reason, imported, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(SystemExit):
        run(imported, tmp_path / "a.jsonl", tmp_path / "out", *flags)
    assert reason in capsys.readouterr().err and not list((tmp_path / "out").glob("*.jsonl"))
