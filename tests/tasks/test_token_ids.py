"""Examples that come as ids."""

import json

import numpy as np
import pytest

from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError

pytest.importorskip("seqio")
from diffusion_t5x.tasks import token_ids

EXAMPLES = [{"inputs": [0, 5, 9], "targets": [7, 2]}, {"inputs": [3]}, {"inputs": [], "targets": [8]}]


def register(folder, lines, **changes):
    path = folder / "ids.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    settings = {"train_file": str(path), "validation_file": str(path), "vocab_size": 10, "eos_id": 2, "pad_id": 6}
    return token_ids.register(**settings | changes)


def rows(name):
    dataset = SeqioDataset(name, {"inputs": 4, "targets": 3}, split="validation", batch_size=3, canvas=False)
    ((batch, _),) = dataset.eval_batches()
    return batch, dataset


def test_ids_are_read_as_they_are(tmp_path):
    batch, dataset = rows(register(tmp_path, map(json.dumps, EXAMPLES)))
    for row, example in enumerate(EXAMPLES):
        assert batch.tokens[row][batch.input_mask[row]].tolist() == example["inputs"]
        assert batch.tokens[row][batch.target_mask[row]].tolist() == example.get("targets", [])
    assert (batch.tokens[batch.segment_ids == 0] == 6).all()
    ids = dataset.token_ids()
    assert (ids.pad_id, ids.eos_id, ids.mask_id, ids.size) == (6, 2, 10, 11)


def test_training_goes_on_where_it_was_saved(tmp_path):
    dataset = SeqioDataset(register(tmp_path, map(json.dumps, EXAMPLES)), {"inputs": 4, "targets": 3}, batch_size=2)
    batches = dataset.train_iterator()
    next(batches)
    resumed = dataset.train_iterator()
    resumed.load_state_dict(batches.state_dict())
    for _ in range(4):
        np.testing.assert_array_equal(next(resumed).tokens, next(batches).tokens)


def test_vocabularies_of_other_ids_are_others(tmp_path):
    first = SeqioDataset(register(tmp_path, []), {"inputs": 4, "targets": 3}).token_ids()
    other = SeqioDataset(register(tmp_path, [], pad_id=0), {"inputs": 4, "targets": 3}).token_ids()
    assert first.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "line,message",
    [
        ("{", r"ids\.jsonl:2: not JSON"),
        ('{"targets": [1]}', r"ids\.jsonl:2: expected"),
        ('{"inputs": 4}', r"ids\.jsonl:2: expected"),
        ('{"inputs": ["a"]}', r"ids\.jsonl:2: ids must be whole numbers from 0 to 9"),
        ('{"inputs": [10]}', r"ids\.jsonl:2: ids must be whole numbers from 0 to 9"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, line, message):
    name = register(tmp_path, ['{"inputs": [1]}', line])
    with pytest.raises(UserError, match=message):
        rows(name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        register(tmp_path, [], train_file="nowhere.jsonl")
