"""The lengths of prompts and answers: all equal, or drawn for each request from a distribution. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

LENGTHS_FORMS = "64 (all equal), 16-512 (uniform) or 128:40 (normal: mean and standard deviation)"


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths, in tokens.

    With ``high``, it is uniform from ``low`` to ``high``. With a ``deviation``, it is normal around ``mean``, and no
    length is below 1. Otherwise every length is the mean.
    """

    mean: float
    deviation: float = 0.0
    low: int | None = None
    high: int | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether all lengths are equal."""
        return self.high is None and self.deviation == 0.0

    def draw(self, rng: Random) -> int:
        """Draws a length of at least 1."""
        if self.low is not None and self.high is not None:
            return rng.randint(self.low, self.high)
        if self.deviation:
            return max(round(rng.gauss(self.mean, self.deviation)), 1)
        return round(self.mean)

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low}-{self.high}"
        return f"{self.mean:g}:{self.deviation:g}" if self.deviation else f"{self.mean:g}"


def parse_lengths(text: str) -> Lengths:
    """Reads a distribution in one of ``LENGTHS_FORMS``. Raises ``ValueError`` for another text, and for a length
    below 1."""
    text = text.strip()
    if uniform := re.fullmatch(r"(\d{1,9})-(\d{1,9})", text):
        low, high = int(uniform[1]), int(uniform[2])
        if not 1 <= low <= high:
            raise ValueError("the first length is at least 1, and not above the second")
        return Lengths((low + high) / 2.0, low=low, high=high)
    if normal := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text):
        mean, deviation = int(normal[1]), int(normal[2])
        if mean < 1:
            raise ValueError("the mean is at least 1")
        return Lengths(float(mean), deviation=float(deviation))
    if re.fullmatch(r"-?\d{1,9}", text):
        return Lengths(float(text))  # ``BenchSettings.check`` tells of a length below 1, with the option's name
    raise ValueError(f"write {LENGTHS_FORMS}")
