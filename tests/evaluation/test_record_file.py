"""Files of records that are gone on with: only with the same settings and data, by one process at a time."""

import json

import pytest

from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.record_file import RecordFile

SETTINGS = {"decoder": "D()", "random_seed": 0}


def examples(number, text="in {}"):
    return [
        {"example_id": n, "inputs_pretokenized": text.format(n), "targets_pretokenized": "t"} for n in range(number)
    ]


def records(found):
    return [example | {"prediction": "p", "score": 0.5} for example in found]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task-test.jsonl"


def write(path, number, text="in {}"):
    file = RecordFile(path, SETTINGS)
    file.write(records(examples(number, text)), number, "title")
    return file


def test_the_same_data_are_gone_on_with_behind_the_last_whole_line(path):
    write(path, 3)
    with path.open("a") as file:
        file.write('{"example_id": 3, "cut sho')
    again = RecordFile(path, SETTINGS)
    assert again.done == 3
    again.check_examples(examples(3))
    again.check_examples(examples(10))  # more of them
    again.write(records(examples(5)), 5, "title")
    assert [json.loads(line) for line in path.read_text().splitlines()] == records(examples(5))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (examples(3, "other {}"), "started with different data: example 0 has changed"),
        ([*examples(2), *examples(3, "new {}")[2:]], "example 2 has changed"),
        (examples(2), "has 3 records, but the data have 2 examples now"),
    ],
)
def test_other_data_are_refused(path, now, message):
    write(path, 3)
    with pytest.raises(UserError, match=message):
        RecordFile(path, SETTINGS).check_examples(now)


@pytest.mark.parametrize("note", ["", "{", "\ud800", None])
def test_a_note_that_cannot_be_read_is_told(path, note):
    write(path, 1)
    settings = path.with_suffix(".settings.json")
    if note is None:
        settings.unlink()
    else:
        settings.write_bytes(note.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"settings\.json, which records its settings, cannot be read"):
        RecordFile(path, SETTINGS)


def test_other_settings_are_refused_but_not_where_nothing_is_written(path):
    write(path, 1)
    with pytest.raises(UserError, match=r"started with different settings \(random_seed"):
        RecordFile(path, SETTINGS | {"random_seed": 1})
    path.write_text("")
    assert RecordFile(path, SETTINGS | {"random_seed": 1}).done == 0


def test_two_at_once_do_not_mix(path):
    def while_writing():
        for record in records(examples(2)):
            with pytest.raises(UserError, match="is being written by another process"):
                second.write(records(examples(2)), 2, "second")
            yield record

    first, second = RecordFile(path, SETTINGS), RecordFile(path, SETTINGS)
    first.write(while_writing(), 2, "first")
    with pytest.raises(UserError, match="was written to by another process"):
        second.write(records(examples(2)), 2, "second")
    assert [json.loads(line) for line in path.read_text().splitlines()] == records(examples(2))
