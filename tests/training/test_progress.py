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
        bar.update(101, {"loss": 3.0}, tokens=64)
        for step in range(102, 142):
            clock.now += 2
            bar.update(step, {"loss": 2.5}, tokens=64)
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


def to_terminal(monkeypatch, columns):
    """Standard error as a terminal of so many columns."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    return sys.stderr


@pytest.mark.parametrize(
    ("columns", "title"),
    [(120, "Masked on a_task_with_a_long_name"), (80, "Mask"), (60, "step 10/10  loss 0.5000  accuracy 0.2500")],
)
def test_a_bar_on_a_terminal(clock, monkeypatch, columns, title):
    terminal = to_terminal(monkeypatch, columns)
    with progress.Progress(total=10, description="Masked on a_task_with_a_long_name") as bar:
        bar.update(1, {"loss": 1.0}, tokens=5)
        clock.now += 1
        bar.update(10, {"loss": 0.5, "accuracy": 0.25}, tokens=1800)
    shown = terminal.getvalue()
    assert title in shown and "\x1b[" in shown
    assert "step 10/10  loss 0.5000  accuracy 0.2500  1,800 tokens/s  " in shown
    assert ("ETA 0:00:00" in shown) == (columns >= 80)


def test_a_pause_is_named_and_no_part_of_the_rate(clock, monkeypatch):
    terminal = to_terminal(monkeypatch, 120)
    with progress.Progress(total=3) as bar:
        bar.update(1, {"loss": 1.0}, tokens=5)
        clock.now += 1
        bar.update(2, {"loss": 1.0}, tokens=100)
        with bar.paused("evaluating …"):
            bar._bar.refresh()
            clock.now += 100
        clock.now += 1
        bar.update(3, {"loss": 1.0}, tokens=100)
    shown = terminal.getvalue()
    assert "evaluating …" in shown and "step 3/3  loss 1.0000  100 tokens/s  ETA 0:00:00" in shown
