"""One way to read text files: what is found, unpacked, split and refused is the same for every reader."""

import gzip
import json
import logging
import os
import time
import zlib

import pytest

from diffusion_t5x import json_lines
from diffusion_t5x.data import text_files
from diffusion_t5x.data.text_files import Pieces
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.predictions import read_predictions

pytest.importorskip("seqio")

from diffusion_t5x.tasks import code_synthesis, question_answering, readers, stories


def json_lines_of(path):
    return list(readers.Jsonl().read([path]))


READERS = {
    "jsonl": json_lines_of,
    "tsv": lambda path: list(readers.Tsv().read([path])),
    "text": lambda path: list(readers.Text("file").read([path])),
    "squad": question_answering.read,
    "predictions": read_predictions,
    "humaneval": lambda path: code_synthesis.humaneval(None, path),
    "stories": lambda path: stories.prompts("", path),
    "value": text_files.json_value,
}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@pytest.mark.parametrize("damage", ["cut", "bytes", "checksum", "no gzip", "garbage behind"])
@every_reader
def test_every_reader_names_a_damaged_gzip_file(read, damage, tmp_path):
    whole = gzip.compress(b'{"inputs": "a"}\n' * 50)
    content = {
        "cut": whole[:-12],
        "bytes": whole[:12] + bytes(8) + whole[20:],
        "checksum": whole[:-8] + zlib.crc32(b"x").to_bytes(4, "little") + whole[-4:],
        "no gzip": b"plain text",
        "garbage behind": whole + b"x",
    }[damage]
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"Cannot read .*a\.jsonl\.gz"):
        read(str(tmp_path / "a.jsonl.gz"))


@every_reader
def test_every_reader_names_a_file_that_is_no_utf_8(read, tmp_path):
    (tmp_path / "a").write_bytes(b'{"inputs": "\xe9"}\n')
    with pytest.raises(UserError, match=r"a:1: not UTF-8"):
        read(str(tmp_path / "a"))


@every_reader
def test_every_reader_names_a_folder_and_a_missing_file(read, tmp_path):
    for name, message in ((".", "older|directory"), ("nowhere", "no file|No such file")):
        with pytest.raises(UserError, match=message):
            read(str(tmp_path / name))


@pytest.mark.parametrize("name", ["jsonl", "squad", "predictions", "humaneval", "value"])
def test_every_json_reader_names_a_file_that_is_nested_without_end(name, tmp_path):
    (tmp_path / "a").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"a(:1)?: JSON that is nested too deeply"):
        READERS[name](str(tmp_path / "a"))


def test_a_gzip_file_may_hold_only_so_much(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_ALWAYS_FINE", 1 << 21)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(1 << 23), 9))
    with pytest.raises(UserError, match=r"bomb\.gz holds more than 2 MiB"):
        Pieces(str(tmp_path / "bomb.gz"))
    (tmp_path / "text.gz").write_bytes(gzip.compress(os.urandom(1 << 21).hex().encode()))
    assert len(Pieces(str(tmp_path / "text.gz"))[0]) == 1 << 22


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_the_same_however_they_are_written(suffix, bom, end, tmp_path):
    content = (bom + end.join(["", "  a ", " \t", "é\u2028b", "", "c"])).encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    lines = Pieces(str(path))
    assert list(lines) == ["  a ", "é\u2028b", "c"]
    assert [lines.where(i).rpartition(":")[2] for i in range(3)] == ["2", "4", "6"]
    assert text_files.text(path) == content.decode("utf-8-sig")


def test_gzip_is_known_by_its_content_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"text"))
    assert list(Pieces(str(tmp_path / "a.txt"))) == ["text"]


@pytest.mark.parametrize("part", [slice(1, None), slice(-2, None), slice(None, None, -1), slice(5, 9)])
def test_a_slice_of_lines_or_records_is_a_list_of_them(part, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 0}\n{"a": 1}\n{"a": 2}\n')
    for items in (Pieces(str(path)), readers.Jsonl().read([str(path)])):
        assert items[part] == list(items)[part]


@pytest.mark.parametrize("blank", [b" " * 1_000_000, b" \n" * 500_000, b"\t\r\n" * 300_000], ids=["line", "LF", "CRLF"])
@pytest.mark.parametrize("pattern", ["LINE", "ANY_LINE", "PARAGRAPHS", "WHOLE"])
@pytest.mark.parametrize("around", [(b"a\n", b"\nb\n"), (b"a\n", b""), (b"", b"")], ids=["between", "end", "alone"])
def test_blank_lines_take_time_by_their_length_alone(pattern, blank, around, tmp_path):
    (tmp_path / "a.txt").write_bytes(blank.join(around))
    start = time.process_time()
    pieces = Pieces(str(tmp_path / "a.txt"), getattr(text_files, pattern))
    assert time.process_time() - start < 20  # with the square of their length it is minutes
    if pattern in ("LINE", "PARAGRAPHS"):
        assert [piece for piece in pieces] == [text.decode().strip() for text in around if text]


def test_paths_are_taken_as_they_are_before_they_are_patterns(tmp_path, caplog):
    for name in ("set[v1]/a.txt", "setv/b.txt", "setv/c.txt", "setv/deep/er/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expand = lambda *names: text_files.expand([str(tmp_path / name) for name in names])  # noqa: E731
    assert expand("set[v1]/a.txt") == [str(tmp_path / "set[v1]/a.txt")]
    assert expand("set[uv]/*.txt") == [str(tmp_path / f"setv/{name}.txt") for name in "bc"]
    assert [os.path.basename(path) for path in expand("setv/**/*.txt")] == ["b.txt", "c.txt", "d.txt"]
    with pytest.raises(UserError, match=r"setv is a folder: name the files in it"):
        expand("setv")
    with pytest.raises(UserError, match=r"There is no file .*deep/e., only folders"):
        expand("setv/deep/e*")
    with caplog.at_level(logging.WARNING):
        expand("setv/*"), expand("setv/b.txt", "setv/?.txt")
    assert "1 folders are left out" in caplog.text and "b.txt is named more than once" in caplog.text


@pytest.mark.parametrize("files", ["my.jsonl", ["my.jsonl"], {}, {"train": []}, {"train": 3}, {"train": [""]}, None])
def test_files_are_named_by_split(files):
    with pytest.raises(UserError, match=r"FILES (names the files of each split|takes a path)"):
        text_files.by_split(files)


def test_json_of_two_fields_of_one_name_is_refused_where_it_is_data():
    assert json_lines.parse('{"a": 1, "a": 2}') == {"a": 2}
    for text in ('{"a": 1, "a": 2}', '[{"b": {"a": 1, "c": 3, "a": 2}}]'):
        with pytest.raises(ValueError, match="the field 'a' occurs twice"):
            json_lines.parse(text, distinct=True)


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\ud800": 1}', b'"\xed\xa0\x80"', b"\xff"])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(ValueError, match="not Unicode"):
        json_lines.parse(text)
    assert json_lines.parse('"\\ud83d\\ude00"') == "😀"
    assert json_lines.parse(json.dumps("é☃")) == "é☃"
