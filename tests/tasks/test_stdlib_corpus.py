"""The corpus: whole files of the library, cut but not changed."""

import pathlib
import sysconfig

from diffusion_t5x.tasks import stdlib_corpus


def test_size_and_contents():
    files = dict(stdlib_corpus.files())
    assert 8e6 < sum(map(len, files.values())) < 16e6
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    assert files["argparse.py"] == (root / "argparse.py").read_bytes().decode()
    assert not any("site-packages" in name or "/test/" in name for name in files)
    assert list(files) == sorted(files)


def test_splits_share_no_file_and_lose_no_character():
    for split in ("train", "validation"):
        whole = "".join(text for name, text in stdlib_corpus.files() if stdlib_corpus.split_of(name) == split)
        assert "".join(stdlib_corpus.documents(split)) == whole
        assert whole
    assert 0.005 < len(stdlib_corpus.documents("validation")) / len(stdlib_corpus.documents("train")) < 0.08


def test_documents_are_cut_at_line_ends():
    documents = stdlib_corpus.documents("validation")
    assert all(documents)
    short = sum(len(document) < stdlib_corpus.DOCUMENT_CHARACTERS for document in documents)
    assert short <= sum(stdlib_corpus.split_of(name) == "validation" for name, _ in stdlib_corpus.files())
