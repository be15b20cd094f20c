"""A rich console for tables and styled text with untrusted content."""

from typing import Any

import rich.console
import rich.text

from diffusion_t5x import terminal


class Console(rich.console.Console):
    """Prints strings, also those in the cells of tables, as `terminal.safe` text. A `Text` is printed as it is."""

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        return super().render_str(terminal.safe(text), **options)


def one_line(text: str, width: int) -> str:
    """Returns safe text (see `terminal.safe`) on one line of at most `width` cells; line breaks and tabs are signs."""
    line = rich.text.Text(terminal.safe(text).replace("\n", "␊").replace("\t", "␉"))
    line.truncate(width, overflow="ellipsis")
    return line.plain
