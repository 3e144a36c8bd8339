"""How long a stream may be silent before its node counts as lost. This is learned from the pauses of earlier answers.

Only the time between tokens counts. Before the first token a server reads the prompt and loads the model, which may
take minutes and is no fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

MIN_TIMEOUT_S = 5.0  # another request's long prompt may hold up a server's tokens for some seconds
PAUSE_FACTOR = 20.0  # the time-out is 20 times the longest pause
DEFAULT_TIMEOUT_S = 30.0  # while no pause is known: nobody would wait longer for one token
MAX_TIMEOUT_S = 300.0
PAUSE_DECAY = 0.9  # factor for the known pause after each answer with shorter pauses: so an outlier is forgotten
MAX_TRACKED = 1024  # pairs of node and model
MIN_PAUSE_S = 0.001  # pieces with a shorter pause came together, so they say nothing about the server's pace


def silence_timeout_s(longest_s: float | None) -> float:
    """The time-out for a stream. ``longest_s`` is the longest known pause between its tokens; ``None`` if none is
    known."""
    return DEFAULT_TIMEOUT_S if longest_s is None else min(max(MIN_TIMEOUT_S, PAUSE_FACTOR * longest_s), MAX_TIMEOUT_S)


class PauseTracker:
    """The longest pause between two pieces of an answer, by node and model. Bounded: the entry that was not learned for
    the longest time is dropped first."""

    def __init__(self) -> None:
        self._longest: dict[tuple[str, str | None], float] = {}

    def longest_s(self, node: str, model: str | None) -> float | None:
        return self._longest.get((node, model))

    def learn(self, node: str, model: str | None, longest_s: float) -> None:
        """Call this after a complete answer, with its longest pause."""
        key = (node, model)
        self._longest[key] = max(longest_s, PAUSE_DECAY * self._longest.pop(key, 0.0))
        while len(self._longest) > MAX_TRACKED:
            self._longest.pop(next(iter(self._longest)))


class SilenceWatch:
    """Watches one node's stream. ``waits_since`` is the time at which the wait for the next piece began. ``longest_s``
    is the longest wait until now. The stream itself updates both, because each token passes there."""

    __slots__ = ("_clock", "_model", "_node", "_pauses", "_timer", "longest_s", "waits_since")

    def __init__(self, pauses: PauseTracker, node: str, model: str | None, clock: Callable[[], float]) -> None:
        self.waits_since = clock()
        self.longest_s = 0.0
        self._pauses = pauses
        self._node = node
        self._model = model
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    def start(self, is_waiting: Callable[[], bool], on_silence: Callable[[float], bool]) -> None:
        """``is_waiting`` returns whether the stream waits for its node: while a slow client holds it up, the node is
        not silent. ``on_silence`` is called with the seconds of silence, and returns whether the watch continues."""
        self._check_in(self._timeout_s(), is_waiting, on_silence)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def learn_pace(self) -> None:
        """Call this when the answer is complete: later answers use its longest pause."""
        if self.longest_s > MIN_PAUSE_S:
            self._pauses.learn(self._node, self._model, self.longest_s)

    def _timeout_s(self) -> float:
        known = self._pauses.longest_s(self._node, self._model)
        if self.longest_s > MIN_PAUSE_S:
            known = max(self.longest_s, known or 0.0)
        return silence_timeout_s(known)

    def _check_in(self, delay_s: float, is_waiting: Callable[[], bool], on_silence: Callable[[float], bool]) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._check, is_waiting, on_silence)

    def _check(self, is_waiting: Callable[[], bool], on_silence: Callable[[float], bool]) -> None:
        self._timer = None
        timeout_s = self._timeout_s()
        waited_s = self._clock() - self.waits_since if is_waiting() else 0.0
        if waited_s < timeout_s:
            self._check_in(timeout_s - waited_s, is_waiting, on_silence)
        elif on_silence(waited_s):
            self._check_in(timeout_s, is_waiting, on_silence)
