"""The README's example of a user's own task runs as it stands."""

import pathlib
import runpy

import pytest

from diffusion_t5x.data.seqio_source import SeqioDataset

pytest.importorskip("seqio")

EXAMPLE = pathlib.Path(__file__).with_name("own_task_example.py")


def test_own_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my_data"
    folder.mkdir()
    for split, lines in (("train", ["one\tun", "two\tdeux"]), ("validation", ["three\ttrois"])):
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    runpy.run_path(str(EXAMPLE))

    dataset = SeqioDataset("my_task", {"inputs": 8, "targets": 8}, split="validation", batch_size=2)
    (batch, examples), *rest = dataset.eval_batches()
    assert not rest
    assert [(e["inputs_pretokenized"], e["targets_pretokenized"]) for e in examples] == [("three", "trois")]
    assert dataset.to_text(batch.tokens[0][batch.target_mask[0]].tolist()) == "trois"
    scores = dataset.score([{**examples[0], "prediction": "trois"}])
    assert scores["exact_match"] == 100
    batch = next(SeqioDataset("my_task", {"inputs": 8, "targets": 8}, batch_size=2).train_iterator())
    texts = [dataset.to_text(batch.tokens[row][batch.target_mask[row]].tolist()) for row in range(2)]
    assert set(texts) <= {"un", "deux"}
