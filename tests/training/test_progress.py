"""Progress: plain lines in a log, a bar on a terminal, and rates that leave compilation out."""

import io
import sys

import pytest

from diffusion_t5x import progress


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines_where_there_is_no_terminal(clock, capsys):
    with progress.Progress(total=1000, start=100, interval=30) as bar:
        clock.now += 500  # compilation
        bar.update(101, loss=3.0, tokens=64)
        for step in range(102, 142):
            clock.now += 2
            bar.update(step, loss=2.5, tokens=64)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "train: step 101/1,000  loss 3.0000",
        "train: step 116/1,000  loss 2.5000  32 tokens/s  ETA 0:29:28",
        "train: step 131/1,000  loss 2.5000  32 tokens/s  ETA 0:28:58",
        "train: step 141/1,000  loss 2.5000  32 tokens/s  ETA 0:28:38",
    ]


def test_examples_without_loss(clock, capsys):
    with progress.Progress(total=512, description="decode", unit="example") as bar:
        bar.update(64)
        clock.now += 40
        bar.update(128)
    assert capsys.readouterr().err.splitlines() == [
        "decode: example 64/512",
        "decode: example 128/512  ETA 0:04:00",
    ]


def test_a_bar_on_a_terminal(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.Progress(total=10) as bar:
        bar.update(1, loss=1.0, tokens=5)
        clock.now += 1
        bar.update(10, loss=0.5, tokens=1800)
    assert "step 10/10  loss 0.5000  1,800 tokens/s  ETA 0:00:00" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()
