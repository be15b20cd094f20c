"""A run that is told to stop at random moments for `--soak_minutes`: nothing grows, nothing is left behind."""

import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import time

import pytest
from killing import environment, from_cache, write_cache

from diffusion_t5x.training.preemption import RUN_AGAIN

pytestmark = pytest.mark.slow
EVERY = 1.0  # seconds between two looks
SETTLED = 60.0  # seconds of a life after which nothing new is expected: all is compiled, pools are full


@dataclasses.dataclass(frozen=True)
class Look:
    """At a process: seconds of its life, resident bytes, numbers of its threads, open files and children."""

    age: float
    memory: int
    threads: int
    files: int
    children: int

    @classmethod
    def at(cls, pid: int, age: float) -> "Look":
        folder = pathlib.Path(f"/proc/{pid}")
        said = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        children = 0
        for task in (folder / "task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
                children += len((task / "children").read_text().split())
        memory = 1024 * int(said["VmRSS"].split()[0])
        return cls(age, memory, int(said["Threads"]), len(list((folder / "fd").iterdir())), children)


def live(argv: list[str], log: pathlib.Path, seconds: float) -> tuple[list[Look], int]:
    """Starts a process, looks at it, and tells it to stop after so many seconds; its exit code, too."""
    looks, start = [], time.monotonic()
    with log.open("ab") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env=environment())
        while (age := time.monotonic() - start) < seconds:
            time.sleep(EVERY)
            assert process.poll() is None, log.read_text()[-3000:]
            looks.append(Look.at(process.pid, age))
        process.send_signal(signal.SIGTERM)
        return looks, process.wait(300)


def test_nothing_grows_and_nothing_is_left(tmp_path, request, monkeypatch):
    minutes, draw = request.config.getoption("--soak_minutes"), random.Random(0)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    write_cache(tmp_path / "cache", "quickstart_pairs")
    run = tmp_path / "run"
    argv = from_cache(tmp_path / "cache", run, 10**9)
    argv += ["--gin.Periods.log=50", "--gin.Periods.save=200", "--gin.EVAL_PERIOD=500"]
    end, lives, codes = time.monotonic() + 60 * minutes, [], []
    while (left := end - time.monotonic()) > 0:
        # Now and then before it trains; every fourth life long enough to see growth.
        seconds = min(left, 3 * SETTLED if len(lives) % 4 == 0 else draw.uniform(5, SETTLED))
        looks, code = live(argv, tmp_path / "log", max(seconds, 5))
        lives.append(looks)
        codes.append(code)
    assert set(codes) <= {RUN_AGAIN, -signal.SIGTERM}, codes  # the latter: nothing to save yet
    assert RUN_AGAIN in codes
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert names and all(name.startswith("checkpoint_") for name in names)
    assert [entry for entry in os.listdir(run) if "tmp" in entry] == []

    for number, looks in enumerate(lives):
        settled = [look for look in looks if look.age > SETTLED]
        if len(settled) < 20:
            continue
        first, last = settled[:10], settled[-10:]
        growth = min(look.memory for look in last) / max(look.memory for look in first) - 1
        print(
            f"life {number}: {looks[-1].age:.0f} s, {last[-1].memory / 2**20:.0f} MiB, grown by {growth:.1%}, ", end=""
        )
        for what in ("threads", "files"):
            ranges = [
                f"{min(found)}-{max(found)}" for found in ([getattr(x, what) for x in part] for part in (first, last))
            ]
            print(f"{what} {ranges[0]}, then {ranges[1]}", end=", " if what == "threads" else "\n")
        assert growth < 0.05
        # A save under way has threads and files of its own; what leaks is there between saves, too.
        assert min(look.threads for look in last) <= max(look.threads for look in first)
        assert min(look.files for look in last) <= max(look.files for look in first)
        assert max(look.children for look in looks) == 0
    print(f"{len(lives)} lives in {minutes} minutes: exit codes {sorted(codes)}")
