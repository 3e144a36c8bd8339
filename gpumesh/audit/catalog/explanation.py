"""The row of the catalog of codes: a code, its usual severity, its title, its meaning and its remedy."""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.state import Severity

E, W, I = Severity.ERROR, Severity.WARNING, Severity.INFO  # noqa: E741  # short: the severity is a column of the rows


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one code means. ``title`` is a clause without a full stop; ``meaning`` and ``remedy`` are sentences."""

    code: str
    severity: Severity
    title: str
    meaning: str
    remedy: str
