"""The flags of a dry run for a TPU slice."""

from collections.abc import Sequence

from diffusion_t5x.command_line.flags import Parser
from diffusion_t5x.command_line.verbs import SLICE_FLAGS, with_flags
from diffusion_t5x.errors import UserError
from diffusion_t5x.performance.dry_run import SliceDryRun


def slice_dry_run(argv: Sequence[str]) -> tuple[SliceDryRun | None, list[str]]:
    """Returns the dry run that `--dry_run --topology=...` asks for, or None, and the other flags.

    Raises:
      UserError: a flag of `--topology` is given without it, or `--topology` without `--dry_run`.
    """
    flags, rest = with_flags(Parser(add_help=False, allow_abbrev=False), SLICE_FLAGS).parse_known_args(argv)
    if flags.topology is None:
        if flags.fit or flags.dry_run_output:
            raise UserError("--fit and --dry_run_output belong to --dry_run --topology=CHIP:SHAPE.")
        return None, rest
    if "--dry_run" not in rest:
        raise UserError("--topology is for a dry run: add --dry_run.")
    return SliceDryRun(flags.topology, flags.dry_run_output, flags.fit), rest
