"""The console that views print on: turns a view into lines, with colours on a terminal, in ASCII where necessary."""

from __future__ import annotations

import shutil
import sys

from rich.console import Console, RenderableType

from gpumesh.cli.views.figures import UNKNOWN

PIPED_WIDTH = 160  # columns, where the output is no terminal and COLUMNS is not set
WIDE_WIDTH = 600  # columns, for `-o wide`: more than any table needs
# The characters beyond ASCII that views draw, and their replacements where the stream cannot encode them.
_TO_ASCII = str.maketrans(
    {
        "●": "*",
        "◐": "~",
        "○": "o",
        "✗": "x",
        "‖": "-",
        "█": "#",
        "░": ".",
        "▒": "+",
        "▓": "=",
        UNKNOWN: "-",
        "─": "-",
        "│": "|",
        "├": "+",
        "└": "+",
        "·": "|",
        "→": ">",
        "↻": "x",
        "…": "~",
        "°": "C",
        "∞": "*",
        "▁": "_",
        "▂": ".",
        "▃": ":",
        "▄": "-",
        "▅": "=",
        "▆": "+",
        "▇": "*",
    }
)


def console(*, stderr: bool = False, wide: bool = False) -> Console:
    """A console for results (stdout), or for remarks and progress (stderr). It uses colours on terminals only, and
    never with NO_COLOR. ``wide``: a view may be as wide as it wants to be; a narrow terminal breaks its lines."""
    stream = sys.stderr if stderr else sys.stdout
    # With the width None, rich asks the terminal, also after its size has changed. If the stream is no terminal, the
    # width is COLUMNS, or PIPED_WIDTH without that variable. (The 50 lines are not used.)
    width = None if stream.isatty() else shutil.get_terminal_size((PIPED_WIDTH, 50)).columns
    if wide:
        width = WIDE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def print_plain(out: Console, view: RenderableType, *, soft_wrap: bool = False) -> None:
    """Prints a view without the blanks that rich appends to lines, and in ASCII where the stream cannot encode other
    characters. With ``soft_wrap`` a line may be longer than the terminal is wide."""
    out.file.write("\n".join(render_lines(out, view, soft_wrap=soft_wrap)) + "\n")


def render_lines(out: Console, view: RenderableType, *, soft_wrap: bool = False) -> list[str]:
    """The lines that ``out`` would show for this view, with colours where ``out`` has them."""
    with out.capture() as capture:
        out.print(view, soft_wrap=soft_wrap)
    text = capture.get().removesuffix("\n")
    if not _can_encode(out):
        text = text.translate(_TO_ASCII)
    return [line.rstrip(" ") for line in text.split("\n")]


def _can_encode(out: Console) -> bool:
    """Whether the stream can encode the characters beyond ASCII that views draw; tested with some of them."""
    try:
        "●█░…▁".encode(out.encoding)
    except (UnicodeEncodeError, LookupError):  # LookupError: Python does not know the encoding
        return False
    return True
