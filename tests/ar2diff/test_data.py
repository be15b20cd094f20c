"""The data of ar2diff: kinds of files, numbers of records and tokens, the share that is held out."""

import gzip
import json

import pytest
import seqio

from diffusion_t5x.ar2diff.data import look
from diffusion_t5x.errors import UserError

BYTES = seqio.ByteVocabulary()


def test_paragraphs_and_tokens_are_counted(tmp_path):
    (tmp_path / "a.md").write_text("\n\n".join(["four"] * 30))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"\n\n".join([b"five!"] * 10)))
    data = look("data", (str(tmp_path / "*"),), BYTES)
    assert (data.num_records, data.unit) == (40, "paragraphs")
    assert data.num_tokens == 30 * 5 + 10 * 6  # each text and its end
    assert data.gin_file == "recipes/ar2diff/shared/texts.gin"


@pytest.mark.parametrize(("records", "percent"), [(8, 50), (20, 20), (100, 20), (240, 10), (10_000, 1)])
def test_small_data_hold_out_more(tmp_path, records, percent):
    (tmp_path / "a.txt").write_text("\n\n".join(["x"] * records))
    assert look("data", (str(tmp_path / "a.txt"),), BYTES).held_out == percent


@pytest.mark.parametrize(
    ("kind", "record", "gin_file", "tokens"),
    [
        ("data", {"text": "abc"}, "jsonl_texts", 4),
        ("prompts", {"inputs": "ab", "targets": "c"}, "prompts", 5),
        ("chat", {"messages": [{"role": "user", "content": "hi"}]}, "chat", 5 + 3),
    ],
)
def test_json_lines_have_the_fields_of_their_kind(tmp_path, kind, record, gin_file, tokens):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for _ in range(10)))
    data = look(kind, (str(file),), BYTES)
    assert data.gin_file == f"recipes/ar2diff/shared/{gin_file}.gin" and data.num_tokens == 10 * tokens
    file.write_text('{"other": "x"}\n' * 10)
    with pytest.raises(UserError, match=rf"a.jsonl.*--{kind} needs a field '{next(iter(record))}'.*it has other"):
        look(kind, (str(file),), BYTES)


def test_files_of_other_or_mixed_kinds_and_too_few_records_are_refused(tmp_path):
    for name in ("a.pdf", "b.txt", "c.jsonl"):
        (tmp_path / name).write_text("x\n")
    with pytest.raises(UserError, match=r"a\.pdf: text comes as \.txt, \.md, \.jsonl"):
        look("data", (str(tmp_path / "a.pdf"),), BYTES)
    with pytest.raises(UserError, match="two kinds"):
        look("data", (str(tmp_path / "[bc]*"),), BYTES)
    with pytest.raises(UserError, match="1 records are too few"):
        look("data", (str(tmp_path / "b.txt"),), BYTES)
