"""Runs chat templates in a separate process, which ends if one takes too much time or memory."""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_t5x.data.template_worker import SECONDS

_WORKER = "import sys; sys.path[:] = sys.argv[1:]; from diffusion_t5x.data import template_worker as w; w.main()"


class TemplateProcess:
    """The process. It starts when first needed, and again after it ended. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # a process made by fork must not share the pipes

    def names(self, template: str) -> list[str]:
        """Returns the variables that a template reads.

        Raises:
          ValueError: it is not valid Jinja, or compiling it takes too much time or memory.
        """
        return self._ask(template, [])["names"]

    def render(self, template: str, renders: Sequence[Mapping[str, Any]]) -> list[str]:
        """Renders a template once for each mapping of its variables.

        Raises:
          ValueError: the template fails, or takes too much time or memory.
        """
        texts = self._ask(template, renders)["texts"]
        if errors := [text["error"] for text in texts if "error" in text]:
            raise ValueError(errors[0])
        return [text["text"] for text in texts]

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process and self._owner == os.getpid():
            process.kill()
            _wait(process)

    def _ask(self, template: str, renders: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        request = json.dumps({"template": template, "renders": list(renders)})
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            try:
                reply = self._exchange(request)
            except BaseException:  # the reply to come would be taken for the next one
                self.close()
                raise
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply

    def _start(self) -> None:
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
        )

    def _exchange(self, request: str) -> dict[str, Any]:
        process = self._process
        assert process and process.stdin and process.stdout
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and says no more
        line = process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        self._process = None
        code = _wait(process)
        if code == -signal.SIGPROF:
            return {"error": f"it runs for more than {SECONDS:g} seconds"}
        return {"error": f"the process that runs it ended with {code}"}


def _wait(process: subprocess.Popen[str]) -> int:
    """Returns the exit code of a process and closes its pipes."""
    with contextlib.suppress(BrokenPipeError), process:
        pass
    return process.wait()


@functools.cache
def shared() -> TemplateProcess:
    """Returns the process that all templates share."""
    process = TemplateProcess()
    atexit.register(process.close)
    return process
