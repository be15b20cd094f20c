"""The prompts of a user's file, as rows for a model imported from llama2.c."""

import json

import pytest

from diffusion_t5x import infer
from diffusion_t5x.command_line import config
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError

pytest.importorskip("seqio")
from diffusion_t5x.tasks import stories


@pytest.fixture
def tokenizer(test_data):
    return str(test_data / "stories260k" / "tok512.bin")


def test_a_line_is_a_prompt_and_the_canvas_is_to_be_written(tokenizer, tmp_path):
    for lines in (["Tom had a red", "", "L'été ☃"], ["another file in the same process"]):
        (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        name = stories.prompts(tokenizer, str(tmp_path / "prompts.txt"))
        dataset = SeqioDataset(name, {"inputs": 24, "targets": 8}, split="test", batch_size=4)
        ((batch, examples),) = dataset.eval_batches()
        assert [example["inputs_pretokenized"] for example in examples] == lines
        for row, line in enumerate(lines):
            inputs = batch.tokens[row][batch.input_mask[row]].tolist()
            assert inputs == dataset.vocabulary().encode(line)  # no EOS: the model goes on
            assert batch.target_mask[row].sum() == 8


def test_texts_are_cut_into_prompts_and_the_rest_without_prompts_of_the_test_set(tokenizer, tmp_path):
    texts = [f"Once there was a {name} who liked to eat." for name in ("cat", "dog", "bird", "cow")]
    again = texts[0] + " It ate."  # begins as a text that is held out
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"prediction": text}) + "\n" for text in [*texts, "Too short", again]))
    name = stories.continuations(tokenizer, str(path), prompt_tokens=8, num_validation=1, num_test=2)
    found = {}
    for split in ("test", "validation", "train"):
        lengths = {"inputs": 8, "targets": 24}
        dataset = SeqioDataset(name, lengths, split=split, batch_size=4, canvas=False)
        ((batch, examples),) = dataset.eval_batches()
        rows = zip(batch.tokens, batch.segment_ids, strict=True)
        found[split] = [dataset.vocabulary().decode(row[there > 0].tolist()) for row, there in rows][: len(examples)]
        assert batch.input_mask.sum(axis=1)[: len(examples)].tolist() == [8] * len(examples)
    assert found == {"test": texts[:2], "validation": texts[2:3], "train": texts[3:]}
    scores = dataset.score([{"prediction": "a b a b", "targets_pretokenized": ""}])
    assert scores == {"distinct_1": 0.5, "distinct_2": pytest.approx(2 / 3), "distinct_3": 1}
    with pytest.raises(UserError, match="has 5 texts of over 8 tokens; 6 are held out"):
        stories.continuations(tokenizer, str(path), prompt_tokens=8, num_validation=1, num_test=5)
    (tmp_path / "other.jsonl").write_text('{"text": "no prediction"}\n')
    for broken, message in (
        ("other.jsonl", 'jsonl:1: no "prediction"'),
        ("nowhere.jsonl", "There is no file .*nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            stories.continuations(tokenizer, str(tmp_path / broken))


def test_mistakes(tokenizer, tmp_path, capsys):
    (tmp_path / "latin-1.txt").write_bytes("été".encode("latin-1"))
    for name, message in (
        ("latin-1.txt", r"latin-1\.txt:1: not UTF-8"),
        ("nowhere.txt", r"Cannot read .*nowhere\.txt"),
    ):
        with pytest.raises(UserError, match=message):
            stories.prompts(tokenizer, str(tmp_path / name))
    files = ["models/decoder_only.gin", "sizes/tiny.gin", "decoding/autoregressive.gin", "runs/infer.gin"]
    flags = [f"--gin_file={file}" for file in [*files, "tasks/stories.gin"]]
    with pytest.raises(SystemExit):
        config.run(infer.infer, [*flags, "--gin.CHECKPOINT_PATH=/tmp", "--gin.INFER_OUTPUT_DIR=/tmp"])
    assert "not set: TOKENIZER_FILE, TEXT_FILE" in capsys.readouterr().err
