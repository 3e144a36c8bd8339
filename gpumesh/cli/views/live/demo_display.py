"""Draws the output of `demo`: lines of text, one after the other, above a status table that is redrawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.safe_text import clean_text
from gpumesh.cli.views.status.status_view import ViewOptions, status_view
from gpumesh.state import MeshState

if TYPE_CHECKING:
    from rich.live import Live

LINES_ABOVE_TABLE = 4  # of the screen: so the last lines of text stay visible
MIN_TABLE_HEIGHT = 8  # lines of the table, however small the screen is


class DemoDisplay:
    """The display inside ``with``. Without a terminal it only prints the lines, and the table when ``print_table`` is
    called."""

    def __init__(self) -> None:
        self._out = console()
        self._live: Live | None = None

    def __enter__(self) -> DemoDisplay:
        from rich.live import Live

        if self._out.is_terminal:
            self._live = Live(console=self._out, auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None

    def update_table(self, state: MeshState) -> None:
        """Redraws the table on a terminal; elsewhere does nothing."""
        if self._live is not None:
            size = self._out.size
            height = max(size.height - LINES_ABOVE_TABLE, MIN_TABLE_HEIGHT)
            view = status_view(state, size.width, ViewOptions(height=height))
            self._live.update(Group(Text(""), view), refresh=True)  # an empty line above the table

    def print_table(self, state: MeshState) -> None:
        """Redraws the table on a terminal; elsewhere prints it."""
        if self._live is None:
            print_plain(self._out, status_view(state, self._out.width, ViewOptions()))
            self._out.file.flush()
        else:
            self.update_table(state)

    def print_line(self, text: str, style: str = "") -> None:
        """Prints a line, on a terminal above the table. ``style``: for rich, as ``bold``."""
        line = Text(clean_text(text), style=style)
        if self._live is not None:
            self._live.console.print(line)
        else:
            print_plain(self._out, line)
            self._out.file.flush()
