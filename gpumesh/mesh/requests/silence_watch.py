"""How long a stream may stay silent before it is taken for lost: learned from how it went so far.

Only between tokens: before the first one a server reads the prompt and loads the model, which may take minutes and is
no fault (facts/ollama-api.md, "Streaming").
"""

from __future__ import annotations

LEAST_S = 5.0  # another request's long prompt may hold up a server's tokens for some seconds
TIMES = 20.0  # so much longer than any pause before
UNKNOWN_S = 30.0  # with no pause to go by: one token in half a minute is as slow as anybody would wait for
MOST_S = 300.0
FORGET = 0.9  # what an old pause still counts after each answer that had none as long: one outlier is forgotten
BOUND = 1024


def patience_s(longest_s: float | None) -> float:
    """For a stream whose tokens were at most ``longest_s`` apart; ``None`` if no two were seen."""
    return UNKNOWN_S if longest_s is None else min(max(LEAST_S, TIMES * longest_s), MOST_S)


class Pauses:
    """The longest pause between two pieces of an answer, by node and model; bounded, the oldest forgotten first."""

    def __init__(self) -> None:
        self._longest: dict[tuple[str, str | None], float] = {}

    def longest_s(self, node: str, model: str | None) -> float | None:
        return self._longest.get((node, model))

    def learn(self, node: str, model: str | None, longest_s: float) -> None:
        """After an answer that came to its end."""
        key = (node, model)
        self._longest[key] = max(longest_s, FORGET * self._longest.pop(key, 0.0))
        while len(self._longest) > BOUND:
            self._longest.pop(next(iter(self._longest)))
