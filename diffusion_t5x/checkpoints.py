"""List, show, verify and compare checkpoints.

CHECKPOINT is a folder checkpoint_<step>; a folder of them or a MODEL_DIR means its newest one. RUN is a MODEL_DIR or a
folder of checkpoints. Exit status: 0 success, 1 something is broken or differs, 2 a wrong command.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator may be in use by the run that is looked at

import rich.box
import rich.table

from diffusion_t5x import terminal
from diffusion_t5x.checkpointing import inspection, stored
from diffusion_t5x.checkpointing.checkpoints import find_checkpoint, find_checkpoints, read_metadata
from diffusion_t5x.command_line import config, help_pages
from diffusion_t5x.console import Console


def list_run(run: str) -> bool:
    """Prints a table of a run's checkpoints; returns True if all their files exist with the right sizes."""
    found = inspection.listing(run)
    metrics = sorted({name for listed in found for name in listed.metrics})
    table = _table("step", "size", "written", "files", "", *metrics)
    for listed in found:
        marks = " ".join(name for name in ("newest", "best") if getattr(listed, name))
        table.add_row(
            f"{listed.step:,}",
            f"{listed.size:,}",
            f"{listed.written:%Y-%m-%d %H:%M:%S %z}" if listed.written else "-",
            "no manifest" if listed.faults is None else "; ".join(listed.faults) or "all there, by size",
            marks,
            *(f"{listed.metrics[name]:.6g}" if name in listed.metrics else "-" for name in metrics),
        )
    _print(table)
    return not any(listed.faults for listed in found)


def show(checkpoint: str) -> bool:
    """Prints the contents of a checkpoint."""
    path = find_checkpoint(checkpoint)
    metadata = read_metadata(str(path))
    config = metadata.pop("config", "")
    arrays = inspection.arrays(path)
    table = _table("array", "dtype and shape")
    for name, kind in arrays.items():
        table.add_row(name, kind)
    _print(str(path), table)
    table = _table("metadata", "")
    for name, value in metadata.items():
        table.add_row(name, str(value))
    _print(table, "config:", config)
    return True


def verify(path: str) -> bool:
    """Reads every file of the checkpoints at a path and compares checksums; returns True if none is broken."""
    table = _table("checkpoint", "files")
    fine = True
    for checkpoint in find_checkpoints(path):
        faults = inspection.faults(checkpoint)
        fine = fine and not faults
        if faults is None:
            table.add_row(checkpoint.name, "no manifest: written before there were checksums; every file can be read")
        else:
            table.add_row(checkpoint.name, "broken: " + "; ".join(faults) if faults else "whole")
    _print(table)
    return fine


def diff(first: str, second: str) -> bool:
    """Prints the differences between two checkpoints; returns True if there are none."""
    found = inspection.difference(first, second)
    if found.arrays:
        table = _table("array", "first", "second", "largest difference", "relative norm")
        for array in found.arrays:
            numbers = ("-" if x is None else f"{x:.3g}" for x in (array.largest, array.relative))
            table.add_row(array.name, array.first or "-", array.second or "-", *numbers)
        _print(table)
    if found.metadata:
        table = _table("metadata", "first", "second")
        for name, values in found.metadata.items():
            table.add_row(name, *("-" if value is None else str(value) for value in values))
        _print(table)
    _print(*found.config)
    _print(f"{found.num_equal} arrays are equal, {len(found.arrays)} differ.")
    return not found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses this verb's flags: `command`, the name of a function in this module, and its arguments."""
    return help_pages.parser("checkpoints").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; exits with status 0, 1 or 2 (see the module)."""
    with config.program():
        arguments = vars(parse(argv))
        commands: dict[str, Callable[..., bool]] = {"list": list_run, "show": show, "verify": verify, "diff": diff}
        command = commands[arguments.pop("command")]
        try:
            sys.exit(0 if command(*arguments.values()) else 1)
        except stored.BrokenCheckpoint as error:
            print(f"error: {terminal.safe(error)}", file=sys.stderr)
            sys.exit(1)


def _table(*columns: str) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(*things: rich.table.Table | str) -> None:
    # Into a file or a pipe, no line is wrapped to a terminal's width.
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False, markup=False)
    for thing in things:
        console.print(thing)


if __name__ == "__main__":
    main()
