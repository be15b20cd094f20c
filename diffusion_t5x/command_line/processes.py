"""Joins several processes that train or decode as one, with JAX's runtime, before JAX looks for devices."""

import argparse
import logging
import os
import sys

from diffusion_t5x.errors import UserError

_VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}

logger = logging.getLogger(__name__)


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Adds `--distributed` and related flags."""
    add = parser.add_argument
    add(
        "--distributed",
        action="store_true",
        help="one of several processes, as TPU slice, Slurm, Open MPI, Kubernetes, JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or these flags say:",
    )
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    add("--num_processes", type=int, metavar="N")
    add("--process_id", type=int, metavar="I", help="of this process, from 0 on")


def join(flags: argparse.Namespace) -> None:
    """Joins this process with the others that `--distributed` names; without that flag, at most connects to Pathways.

    Raises:
      UserError: flags or environment do not determine the processes, or the others do not connect.
    """
    if "proxy" in os.environ.get("JAX_PLATFORMS", "").split(","):
        _connect_to_pathways(flags.distributed)
    given = {name: getattr(flags, name) for name in _VARIABLES}
    if not flags.distributed:
        if named := [f"--{name}" for name, value in given.items() if value is not None]:
            raise UserError(f"{', '.join(named)}: add --distributed.")
        return
    for name, variable in _VARIABLES.items():
        if given[name] is None and variable in os.environ:
            given[name] = os.environ[variable]
    try:
        for name in ("num_processes", "process_id"):
            given[name] = None if given[name] is None else int(given[name])
    except ValueError:
        raise UserError(f"{_VARIABLES[name]} = {given[name]!r} is not a number.") from None
    known = [value is not None for value in given.values()]
    if any(known) and not all(known):
        missing = [f"--{name} ({_VARIABLES[name]})" for name, value in given.items() if value is None]
        raise UserError(f"--distributed with an address also needs {', '.join(missing)}.")
    if all(known) and not 0 <= given["process_id"] < given["num_processes"]:
        raise UserError(f"--process_id {given['process_id']} must be below --num_processes {given['num_processes']}.")
    import jax  # `--help` and mistakes in gin files need not wait for it

    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        if all(known):
            raise UserError(f"--distributed: the processes could not connect ({error}).") from error
        raise UserError(
            "--distributed: nothing here says which processes there are (no TPU slice, Slurm, Open MPI or Kubernetes "
            f"is seen: {error}). Give --coordinator_address, --num_processes and --process_id."
        ) from error
    if jax.process_index():  # process 0 logs what is logged once
        logging.getLogger("diffusion_t5x").setLevel(logging.WARNING)
    logger.info("%d processes with %d devices", jax.process_count(), jax.device_count())


def _connect_to_pathways(distributed: bool) -> None:
    """Lets JAX find the devices of a Pathways cluster, whose proxy JAX_BACKEND_TARGET names."""
    if distributed:
        raise UserError("JAX_PLATFORMS=proxy: with Pathways there is one process. Leave out --distributed.")
    try:
        import pathwaysutils
    except ImportError:
        raise UserError(
            "JAX_PLATFORMS=proxy needs pathwaysutils: pip install 'diffusion_t5x[pathways]'. (Without Pathways, unset "
            "JAX_PLATFORMS.)"
        ) from None
    pathwaysutils.initialize()


def in_32_bits() -> None:
    """Switches off JAX_ENABLE_X64, which some shells set: models compute in 32 bits or less."""
    if os.environ.pop("JAX_ENABLE_X64", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        logger.info("JAX_ENABLE_X64 is ignored: models compute in 32 bits or less")
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_enable_x64", False)


def are_joined() -> bool:
    """True if this process is one of several."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def is_first() -> bool:
    """True if this process is alone, or the first of several."""
    return not are_joined() or sys.modules["jax"].process_index() == 0


def leave() -> None:
    """Waits for the other processes to end; a joined process that does not wait would never end."""
    if are_joined():
        sys.modules["jax"].distributed.shutdown()


def give_up(status: int) -> None:
    """Ends a joined process at once, and with it the others, which wait for its results."""
    if are_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
