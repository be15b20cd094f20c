"""Show runs in one page: learning curves, scores, decoded examples, canvases step by step, decode times.

RUN is a folder that train, eval, infer or benchmark wrote, or a folder that holds such folders. --output FILE.md writes
the tables of scores alone, as Markdown; --output FILE.svg one traced example, as a moving picture.
"""

import argparse
import sys
from collections.abc import Sequence

from diffusion_t5x.command_line import help_pages
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.report import write_report


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of this verb: `runs`, `output` and `example`."""
    return help_pages.parser("report").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the page; a `UserError` is one line on stderr and status 2."""
    try:
        flags = parse(argv)
        print(f"wrote {write_report(flags.runs, flags.output, flags.example)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
