"""The values that a model's config refuses, and those that it works out."""

import dataclasses

import pytest
import tiny

from diffusion_t5x.errors import UserError


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"num_layers": 0}, "num_layers must be from 1 to 1,000,000, not 0"),
        ({"num_layers": 10**9}, "num_layers must be from 1 to 1,000,000, not 1,000,000,000"),
        ({"rotary_base": 0.0}, "rotary_base must be above 0"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"position": "absolute"}, "position"),
        ({"position": "rotary", "head_dim": 5}, "head_dim"),
        ({"position": "learned"}, "max_length"),
        ({"norm": "batch"}, "norm"),
        ({"norm": "layer", "norm_offset": True}, "norm_offset"),
        ({"activation": "relu"}, "activation"),
        ({"remat": "some"}, "remat"),
        ({"attention_backend": "fast"}, "attention_backend"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
        ({"relative_max_distance": 8}, "relative_max_distance"),
        ({"relative_buckets": 3}, "relative_buckets"),
    ],
)
def test_bad_values_are_refused_by_name(changes, word):
    with pytest.raises(UserError, match=word):
        dataclasses.replace(tiny.RELATIVE, **changes)


def test_vocabulary_size_is_rounded_up_or_checked():
    unset = dataclasses.replace(tiny.RELATIVE, vocab_size=None)
    assert [unset.with_vocabulary(size).vocab_size for size in (1, 128, 129)] == [128, 128, 256]
    assert tiny.RELATIVE.with_vocabulary(32).vocab_size == 32
    with pytest.raises(UserError, match=r"vocab_size = 32 is too small: .* 33 ids"):
        tiny.RELATIVE.with_vocabulary(33)


def test_rows_longer_than_the_model_are_refused():
    config = dataclasses.replace(tiny.RELATIVE, max_length=10)
    config.check_length(10)
    tiny.RELATIVE.check_length(10**6)
    with pytest.raises(UserError, match=r"11 tokens.*max_length is 10"):
        config.check_length(11)
