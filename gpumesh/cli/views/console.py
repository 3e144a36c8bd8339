"""The console that views print on. It turns a view into lines, with colours where it has them, and with ASCII signs
where the stream cannot encode others."""

from __future__ import annotations

import shutil
import sys

from rich.console import Console, RenderableType

from gpumesh.cli.views.figures import UNKNOWN

PIPED_WIDTH = 160  # columns, where the output is no terminal and COLUMNS is not set
# Characters beyond ASCII -> their replacements on terminals and pipes that cannot encode them.
_ASCII = str.maketrans(
    {
        "●": "*",
        "◐": "~",
        "✗": "x",
        "‖": "-",
        "█": "#",
        "░": ".",
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


def console(*, stderr: bool = False) -> Console:
    """For results (stdout), or for remarks and progress (stderr). Colours on terminals only, and never with
    NO_COLOR."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else shutil.get_terminal_size((PIPED_WIDTH, 50)).columns
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def print_plain(out: Console, view: RenderableType) -> None:
    """Prints without the blanks that rich pads lines with, and in ASCII where the stream cannot encode other
    characters."""
    out.file.write("\n".join(render_lines(out, view)) + "\n")


def render_lines(out: Console, view: RenderableType) -> list[str]:
    """The lines that ``out`` would show, with colours where it has them."""
    with out.capture() as captured:
        out.print(view)
    text = captured.get().removesuffix("\n")
    return [line.rstrip(" ") for line in (text if _can_encode(out) else text.translate(_ASCII)).split("\n")]


def _can_encode(out: Console) -> bool:
    try:
        "●█░…▁".encode(out.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
