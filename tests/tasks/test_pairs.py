"""Files of preference pairs as rows of two texts."""

import json

import numpy as np
import pytest
from variants import quick

from diffusion_t5x.data.pair_source import PairDataset, check_pairs
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError
from diffusion_t5x.objectives.preferences import texts_of_pairs

pytest.importorskip("seqio")

from diffusion_t5x.tasks import local_files, pairs, readers

LENGTHS = {"inputs": 4, "targets": 6}
RECORDS = [("ab", "yes", "no"), ("c", "good", "far too long"), ("def", "", "x")]


@pytest.fixture
def task(tmp_path):
    lines = (json.dumps(dict(zip(("q", "good", "bad"), record, strict=True))) + "\n" for record in RECORDS)
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    files = {"train": str(tmp_path / "pairs.jsonl")}
    return pairs.task("my_pairs", files, readers.Structured(), None, "{q}", "{good}", "{bad}")


@pytest.mark.parametrize("canvas", quick([True, False], [True]))
def test_each_half_is_the_row_of_its_text(task, tmp_path, canvas):
    found, records = next(PairDataset(task, LENGTHS, batch_size=4, canvas=canvas).eval_batches())
    assert found.tokens.shape == (4, 20) and set(np.unique(found.segment_ids)) == {0, 1, 2}
    assert [record["rejected_pretokenized"] for record in records] == [bad for _, _, bad in RECORDS]
    texts = texts_of_pairs(found)
    for half, field in enumerate(("good", "bad")):
        name = local_files.task(
            "alone", {"train": str(tmp_path / "pairs.jsonl")}, readers.Structured(), None, "{q}", f"{{{field}}}"
        )
        alone, _ = next(SeqioDataset(name, LENGTHS, batch_size=4, canvas=canvas).eval_batches())
        for key in ("tokens", "target_mask", "segment_ids", "positions"):
            np.testing.assert_array_equal(getattr(texts, key)[half::2], getattr(alone, key))
    np.testing.assert_array_equal(texts.example_ids, [0, 0, 1, 1, 2, 2, 3, 3])


def test_rejected_texts_that_are_cut_are_counted(task):
    assert PairDataset(task, LENGTHS, batch_size=4).count_cut(3).cut == {"inputs": 0, "targets": 0, "rejected": 1}


def test_training_goes_on_where_it_was(task):
    dataset = PairDataset(task, LENGTHS, batch_size=2)
    batches = dataset.train_iterator()
    first, state, second = next(batches), batches.state_dict(), next(batches)
    assert first.tokens.shape == (2, dataset.row_length) == (2, 20)
    again = dataset.train_iterator()
    again.load_state_dict(state)
    np.testing.assert_array_equal(next(again).tokens, second.tokens)


def test_as_texts_the_task_has_the_chosen_ones(task):
    _, records = next(SeqioDataset(task, LENGTHS, batch_size=4).eval_batches())
    assert [(x["inputs_pretokenized"], x["targets_pretokenized"]) for x in records] == [x[:2] for x in RECORDS]


def test_mistakes(task, tmp_path):
    files = {"train": str(tmp_path / "pairs.jsonl")}
    plain = local_files.task("plain", files, readers.Structured(), None, "{q}", "{good}")
    for dataset, message in (
        (PairDataset(plain, LENGTHS), "'plain' has no pairs: it needs the features"),
        (PairDataset(task, LENGTHS, pack=True, canvas=False), "one pair each: set pack = False"),
        (PairDataset(task, LENGTHS, architecture="encoder_decoder"), "decoder-only rows"),
        (PairDataset(pairs.task("other", files, readers.Structured(), None), LENGTHS), "no field 'prompt'"),
    ):
        with pytest.raises(UserError, match=message):
            dataset.check()
    for dataset, reads_pairs in ((PairDataset(task, LENGTHS), False), (SeqioDataset(task, LENGTHS), True)):
        check_pairs("Mine", not reads_pairs, [dataset])
        with pytest.raises(UserError, match="Mine reads"):
            check_pairs("Mine", reads_pairs, [dataset])
