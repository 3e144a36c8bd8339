"""How long a stream may stay silent before it is taken for lost: learned from how it went so far.

Only between tokens: before the first one a server reads the prompt and loads the model, which may take minutes and is
no fault (facts/ollama-api.md, "Streaming").
"""

from __future__ import annotations

MIN_TIMEOUT_S = 5.0  # another request's long prompt may hold up a server's tokens for some seconds
PAUSE_FACTOR = 20.0  # so much longer than any pause before
DEFAULT_TIMEOUT_S = 30.0  # with no pause to go by: one token in half a minute is as slow as anybody would wait for
MAX_TIMEOUT_S = 300.0
FORGET = 0.9  # what an old pause still counts after each answer that had none as long: one outlier is forgotten
MAX_STREAM_KINDS = 1024


def silence_timeout_s(longest_s: float | None) -> float:
    """For a stream whose tokens were at most ``longest_s`` apart; ``None`` if no two were seen."""
    return DEFAULT_TIMEOUT_S if longest_s is None else min(max(MIN_TIMEOUT_S, PAUSE_FACTOR * longest_s), MAX_TIMEOUT_S)


class PauseTracker:
    """The longest pause between two pieces of an answer, by node and model; bounded, the oldest forgotten first."""

    def __init__(self) -> None:
        self._longest: dict[tuple[str, str | None], float] = {}

    def longest_s(self, node: str, model: str | None) -> float | None:
        return self._longest.get((node, model))

    def learn(self, node: str, model: str | None, longest_s: float) -> None:
        """After an answer that came to its end."""
        key = (node, model)
        self._longest[key] = max(longest_s, FORGET * self._longest.pop(key, 0.0))
        while len(self._longest) > MAX_STREAM_KINDS:
            self._longest.pop(next(iter(self._longest)))
