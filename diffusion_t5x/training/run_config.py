"""config.gin in a MODEL_DIR: the resolved configuration of a run, and of its earlier parts."""

import difflib
import logging
import pathlib

from diffusion_t5x import records

logger = logging.getLogger(__name__)

_SHOWN = 10
_NOTHING = "# This run was started from Python, without gin. Its checkpoints' records say what it trains.\n"


def write_config(file: str, text: str, step: int) -> None:
    """Writes the configuration of a run that starts or continues at a step.

    An earlier configuration that differs is kept as `config_<step>.gin`, and the log says what changed. For a run that
    was started without gin, it says so.
    """
    text = text if _statements(text) else _NOTHING
    path = pathlib.Path(file)
    before = path.read_text(encoding="utf-8") if path.exists() else text
    if changes := changed_lines(before, text):
        kept = _free(path.with_name(f"{path.stem}_{step}{path.suffix}"))
        path.rename(kept)
        more = f"\n  and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        shown = "".join(f"\n  {line}" for line in changes[:_SHOWN])
        logger.info("the configuration changed at step %d; the earlier one is %s:%s%s", step, kept, shown, more)
    records.write_text(path, text)


def changed_lines(before: str, after: str) -> list[str]:
    """Returns lines that only one of two gin texts has, after "-" or "+"; comments, imports and order do not matter."""
    return [line for line in difflib.ndiff(_statements(before), _statements(after)) if line[0] in "+-"]


def _statements(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not line.startswith(("#", "from ", "import "))]


def _free(path: pathlib.Path) -> pathlib.Path:
    names = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in range(2, 10_000))
    return next(name for name in (path, *names) if not name.exists())
