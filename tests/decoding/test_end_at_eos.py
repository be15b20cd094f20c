"""An output ends at its first EOS."""

import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.decoder import end_at_eos


@pytest.mark.parametrize(
    "written,expected",
    [
        ([5, 6, 7, 8], [5, 6, 7, 8]),  # no EOS: the whole canvas
        ([5, 1, 7, 1], [5, 1, 0, 0]),
        ([5, 6, 7, 1], [5, 6, 7, 1]),
        ([1, 6, 7, 8], [1, 0, 0, 0]),  # EOS first: nothing
        ([5, 0, 7, 1], [5, 0, 0, 0]),  # pad before EOS
        ([0, 5, 6, 1], [0, 0, 0, 0]),
    ],
)
def test_targets_end_at_the_first_eos_or_pad(written, expected):
    # Inputs hold EOS and pad as well, and there is padding behind: neither ends an output nor is touched.
    batch = tiny.pack([[([0, 1, 9], written)], [([], [9, 9, 9, 9, 9])]], length=9)
    batch.tokens[0, 7:] = 1
    tokens = np.asarray(end_at_eos(batch.tokens, batch, tiny.VOCABULARY))
    assert tokens.tolist() == [[0, 1, 9, *expected, 1, 1], [9, 9, 9, 9, 9, 0, 0, 0, 0]]
