"""`generate` in a terminal: the canvas that is drawn, and a conversation."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import numpy as np
import pytest
import rich.console
import tiny

from diffusion_t5x.chat.live_canvas import LiveCanvas

pytest.importorskip("seqio")
from untrained import untrained


def test_the_canvas_is_drawn_with_blocks_for_what_is_not_written():
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=20, height=6)
    canvas = LiveCanvas(console, lambda tokens: [chr(token) for token in tokens], left_to_right=False)
    batch = tiny.one_a_row([([1], [0] * 6)])
    row = np.array([[1, *b"a\nb\x1bcd"]])
    with canvas.shown(batch):
        assert canvas.picture().plain == ""
        canvas(np.int32(2), row, np.array([[0, 0.9, 0.9, 0, 0.5, 0, 0.1]]))
        assert canvas.picture().plain == "a\n░␛░d" and canvas.num_steps == 2
        canvas(np.int32(1), row, np.ones((1, 7)))  # overtaken
        assert canvas.picture().plain == "a\n░␛░d"
        canvas(np.int32(3), row, np.ones((1, 7)))
        assert canvas.picture().plain == "a\nb␛cd"
    growing = LiveCanvas(console, lambda tokens: [chr(token) for token in tokens], left_to_right=True)
    with growing.shown(batch):
        growing(np.int32(1), row, np.array([[0, 0.9, 0.9, 0, 0, 0, 0]]))
        assert growing.picture().plain == "a\n"
    assert "\x1b[?25h" in console.file.getvalue().rpartition("\x1b[?25l")[2]  # the cursor is back


IN_A_TERMINAL = """
import fcntl, runpy, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C becomes a signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in a shell's background
runpy.run_module("diffusion_t5x.generate", run_name="__main__", alter_sys=True)
"""


class Session:
    """The verb in a terminal of its own."""

    def __init__(self, *flags):
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-c", IN_A_TERMINAL, *flags]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def type(self, text):
        os.write(self._ours, text.encode())

    def wait_for(self, pattern, seconds=120):
        """Reads up to the pattern and returns that text; the rest is kept for the next call."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, self.text
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert re.search(pattern, self.text), self.text
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before


@pytest.mark.slow
def test_a_conversation_in_a_terminal(tmp_path):
    folder = untrained(tmp_path, "objectives/sundae.gin", "decoding/sundae.gin")
    session = Session(
        "--checkpoint", str(folder), "--gin.SundaeDecoder.num_steps=1000", "--gin.SundaeDecoder.num_samples=1"
    )
    try:
        assert "SundaeDecoder(num_steps=1000" in session.wait_for("> ")
        session.type("hello\n")
        session.wait_for(r"\x1b\[3[0-7]m")  # what is written has colours
        session.type("\x03")
        session.wait_for(r"stopped after [1-9]\d* passes of the model")
        session.wait_for("> ")
        session.type("x" * 30 + "\n")
        session.wait_for("The prompt is refused: it has 31 tokens")
        session.wait_for("> ")
        session.type("hello\n")
        answer = session.wait_for(r"\d+ tokens in [\d.]+ s, \d+ tokens/s, 1000 passes of the model")
        assert answer.count("\x1b[2K") > 3  # drawn again and again
        session.wait_for("> ")
        session.type("\x04")
        assert session.process.wait(60) == 0
        assert "Traceback" not in session.text
    finally:
        session.process.kill()
        session.process.wait()
