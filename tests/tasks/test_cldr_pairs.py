"""The pairs: known renderings, a function, disjoint splits, the same in every process."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from diffusion_t5x.tasks import cldr_pairs

SPLITS = ("train", "validation", "test")
EVERY = {split: cldr_pairs.pairs(split) for split in SPLITS}


def test_splits_are_disjoint_and_large_enough():
    texts = [pair.english for pairs in EVERY.values() for pair in pairs]
    assert len(texts) == len(set(texts))
    assert len(EVERY["train"]) > 30_000
    assert len(EVERY["validation"]) >= 512
    assert len(EVERY["test"]) >= 512
    assert all(cldr_pairs.split_of(pair.english) == split for split, pairs in EVERY.items() for pair in pairs)


def test_the_first_test_pairs_are_a_fair_sample_of_the_kinds():
    first = Counter(pair.kind for pair in EVERY["test"][:512])
    share = Counter(pair.kind for pairs in EVERY.values() for pair in pairs)
    total = sum(share.values())
    for kind, count in share.items():  # within five standard deviations
        expected = 512 * count / total
        assert abs(first[kind] - expected) < 5 * expected**0.5, kind


def test_renderings_are_those_of_cldr():
    french = {pair.english: pair.french for pairs in EVERY.values() for pair in pairs}
    known = {  # checked by hand against the CLDR charts for French
        "Poland": "Pologne",
        "6 megahertz": "6\u00a0mégahertz",
        "4th quarter 2020": "4e trimestre 2020",
        "March 5, 2018": "5 mars 2018",
        "£96.00": "96,00\u00a0£GB",
        "R$7,980.58": "7\u202f980,58\u00a0R$",
        "2:36:26\u202fPM": "14:36:26",
        "271 seconds ago": "il y a 271 secondes",
    }
    assert {english: french.get(english) for english in known} == known


@pytest.mark.slow
def test_same_data_whatever_the_hash_seed():
    code = (
        "import hashlib; from diffusion_t5x.tasks import cldr_pairs, stdlib_corpus;"
        "data = [cldr_pairs.pairs(s) for s in ('train', 'validation', 'test')], stdlib_corpus.documents('train');"
        "print(hashlib.sha256(repr(data).encode()).hexdigest())"
    )
    run = [sys.executable, "-c", code]
    digests = {
        subprocess.run(run, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
