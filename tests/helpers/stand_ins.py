"""Small programs in place of tools that a machine lacks (srun, gcloud, xpk) or that would take long (python)."""

import os
import pathlib
import subprocess

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


def program(path: pathlib.Path, script: str) -> pathlib.Path:
    """Writes a bash script that can be run, and its folders; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}")
    path.chmod(0o755)
    return path


def environment(folder: pathlib.Path | None = None, **variables: str) -> dict[str, str]:
    """This process's environment, with the programs of `folder` before all others.

    Settings of the launchers and of a surrounding Slurm job are left out: DIFFUSION_T5X_VENV would run the real Python.
    """
    left_out = ("DIFFUSION_T5X_", "SLURM_", "SRUN_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    if folder is not None:
        kept["PATH"] = f"{folder}{os.pathsep}{kept['PATH']}"
    return kept | variables


def run(script: pathlib.Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Runs a launcher to its end."""
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
