"""The value of an option that is a duration: with a unit as in mesh.yaml (``500ms``, ``30s``, ``2m``), or seconds."""

from __future__ import annotations

import re
from collections.abc import Callable

import typer

DURATION_METAVAR = "DURATION"


def duration_parser(minimum_s: float) -> Callable[[str], float]:
    """The ``parser`` of a typer option. It returns seconds, and raises BadParameter for what is no duration, and for
    less than ``minimum_s``. typer gives it the default value too, which is a number."""

    def parse(value: str | float) -> float:
        """Reads a duration such as 500ms or 2m, or a number of seconds."""
        from gpumesh.config.value_parsers import format_duration, parse_duration

        text = str(value).strip()
        is_number = re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) is not None
        try:
            seconds = parse_duration(f"{text}s" if is_number else text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is no duration: write 500ms, 30s, 2m, or a number of seconds") from None
        if seconds < minimum_s:
            raise typer.BadParameter(f"{text!r} is less than {format_duration(minimum_s)}")
        return seconds

    return parse
