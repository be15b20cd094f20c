"""Show runs on one page: learning curves, scores, decoded examples, canvases step by step, decode times.

RUN is a folder that train, eval, infer or benchmark wrote, or a folder of such folders; --checkpoint DIR means the
MODEL_DIR of a checkpoint, with the results in it. --output FILE.md writes only the score tables, as Markdown;
--output FILE.svg writes one traced example as an animation.
"""

import argparse
from collections.abc import Sequence

from diffusion_t5x import terminal
from diffusion_t5x.checkpointing.checkpoints import open_checkpoint
from diffusion_t5x.command_line import config, help_pages
from diffusion_t5x.errors import UserError
from diffusion_t5x.reporting.report import write_report


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses this verb's flags: `runs`, `output` and `example`."""
    flags = help_pages.parser("report").parse_args(argv)
    if flags.checkpoint:
        flags.runs.append(str(open_checkpoint(flags.checkpoint).model_dir))
    if not flags.runs:
        raise UserError("No runs. Name folders that train, eval, infer or benchmark wrote, or give --checkpoint DIR.")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the page; a `UserError` becomes one line on stderr and exit status 2."""
    with config.program():
        flags = parse(argv)
        print(terminal.safe(f"wrote {write_report(flags.runs, flags.output, flags.example)}"))


if __name__ == "__main__":
    main()
