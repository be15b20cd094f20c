"""Show runs in one page: learning curves, scores, decoded examples, canvases step by step, decode times.

RUN is a folder that train, eval, infer or benchmark wrote, or a folder that holds such folders; --checkpoint DIR means
the MODEL_DIR of a checkpoint, and what its readers wrote there. --output FILE.md writes the tables of scores alone, as
Markdown; --output FILE.svg one traced example, as a moving picture.
"""

import argparse
from collections.abc import Sequence

from diffusion_t5x import terminal
from diffusion_t5x.checkpointing.checkpoints import open_checkpoint
from diffusion_t5x.command_line import config, help_pages
from diffusion_t5x.errors import UserError
from diffusion_t5x.reporting.report import write_report


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of this verb: `runs`, `output` and `example`."""
    flags = help_pages.parser("report").parse_args(argv)
    if flags.checkpoint:
        flags.runs.append(str(open_checkpoint(flags.checkpoint).model_dir))
    if not flags.runs:
        raise UserError("No runs. Name folders that train, eval, infer or benchmark wrote, or give --checkpoint DIR.")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the page; a `UserError` is one line on stderr and status 2."""
    with config.program():
        flags = parse(argv)
        print(terminal.safe(f"wrote {write_report(flags.runs, flags.output, flags.example)}"))


if __name__ == "__main__":
    main()
