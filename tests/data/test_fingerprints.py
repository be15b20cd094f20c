"""A run that goes on says what has changed in the files that it reads."""

import json
import os

import pytest

from diffusion_t5x.data import fingerprints
from diffusion_t5x.data.seqio_source import SeqioDataset

seqio = pytest.importorskip("seqio")

from diffusion_t5x.tasks import local_files, question_answering, readers  # noqa: E402


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: None, []),
        (lambda folder: (folder / "a").write_text("x" * 20_001), ["a had 20,000 bytes and has 20,001"]),
        (lambda folder: (folder / "a").write_text("y" * 20_000), ["a has other contents"]),
        (lambda folder: (folder / "deep" / "b").unlink(), ["deep/b is gone"]),
        (lambda folder: (folder / "c").write_text(""), ["c is new"]),
    ],
)
def test_what_has_changed_is_named(change, said, tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).write_text("x" * 20_000)
    files = [str(tmp_path / name) for name in ("a", "deep/b", "c")]
    before = fingerprints.of_files(files)
    change(tmp_path)
    kept = {name: tuple(value) for name, value in json.loads(fingerprints.to_bytes(before)).items()}
    assert fingerprints.changes(kept, fingerprints.of_files(files)) == said


def test_a_folder_may_be_moved_and_many_files_are_one(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    for number in range(5):
        (tmp_path / "old" / f"{number}").write_text("x")
    found = fingerprints.of_files([str(path) for path in (tmp_path / "old").iterdir()])
    (tmp_path / "old").rename(tmp_path / "new")
    assert fingerprints.of_files([str(path) for path in (tmp_path / "new").iterdir()]) == found and len(found) == 5
    monkeypatch.setattr(fingerprints, "_MOST_NAMES", 4)
    assert len(fingerprints.of_files([str(path) for path in (tmp_path / "new").iterdir()])) == 2


@pytest.mark.parametrize("held_out", [None, {"validation": 10.0}])
def test_a_resumed_run_says_that_its_data_have_changed(held_out, tmp_path, caplog):
    file = tmp_path / "a.tsv"
    file.write_text("".join(f"{i}\t{i}\n" for i in range(100)))

    def data():
        name = local_files.task(
            "mine", {"train": str(file)}, readers.Tsv(("inputs", "targets")), None, held_out=held_out
        )
        return SeqioDataset(name, {"inputs": 8, "targets": 8}, batch_size=4)

    batches = data().train_iterator()
    next(batches)
    state = batches.state_dict()
    data().train_iterator().load_state_dict(state)
    assert "have changed" not in caplog.text
    with file.open("a") as more:
        more.write("100\t100\n")
    data().train_iterator().load_state_dict(state)
    assert "the training data have changed since the checkpoint: a.tsv had 580 bytes and has 588" in caplog.text
    caplog.clear()
    del state["files"]  # as earlier checkpoints
    data().train_iterator().load_state_dict(state)
    assert "have changed" not in caplog.text


def test_seqio_s_own_files_and_squad_s_are_known(tmp_path):
    (tmp_path / "train.txt").write_text("a\n")
    vocabulary = seqio.ByteVocabulary()
    if "lines_of_files" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("lines_of_files")
    seqio.TaskRegistry.add(
        "lines_of_files",
        source=seqio.TextLineDataSource({"train": str(tmp_path / "train.txt")}),
        preprocessors=[],
        output_features={"targets": seqio.Feature(vocabulary)},
    )
    assert list(SeqioDataset("lines_of_files", {"targets": 8}).fingerprint()) == ["train.txt"]
    (tmp_path / "squad.json").write_text("{}")
    question_answering.squad(None, {"train": os.path.join(tmp_path, "*.json")})
    assert list(SeqioDataset("squad", {"inputs": 8, "targets": 8}).fingerprint()) == ["squad.json"]
