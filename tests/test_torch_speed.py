"""The model in PyTorch that training speed is compared with computes what ours does."""

import pathlib

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"


def test_both_learn_the_same(monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed: the extra `hf`")
    monkeypatch.syspath_prepend(str(LAUNCH))
    import torch_speed

    config = torch_speed.ModelConfig(embed_dim=16, num_layers=2, num_heads=2, head_dim=8, mlp_dim=32)
    monkeypatch.setitem(torch_speed.CASES, "small", torch_speed.Case(config, vocabulary=50, rows=2, length=40))
    trainers = torch_speed.start("small")  # compares the first losses
    ours, theirs = (trainer.steps(5) for trainer in trainers.values())
    assert ours == pytest.approx(theirs, rel=1e-3) and ours[-1] < ours[0]
