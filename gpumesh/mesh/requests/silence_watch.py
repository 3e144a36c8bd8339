"""``SilenceWatch`` decides when a silent stream counts as lost. It learns from the pauses of earlier answers.

What a silence means depends on what the server is doing. Before the first token it loads the model and reads the
prompt, which may take minutes and is no fault: only the time between tokens counts. While the server writes, tokens
come at its pace, unless it also reads another prompt or loads another model. Then the tokens of all answers may wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Protocol

from gpumesh.mesh.nodes.lease import LeasedNode

MIN_TIMEOUT_S = 5.0  # a server's tokens may be held up for some seconds by what we do not see
PAUSE_FACTOR = 20.0  # the time-out is so many times the longest known pause
# The time-out while no pause is known, and at least this long while the server reads another prompt: nobody would wait
# longer for one token.
DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 300.0  # upper limit: whatever was learned, a node that sends nothing for so long is lost
# After an answer with shorter pauses, the known pause shrinks to this share of it. So a single long pause is forgotten.
PAUSE_DECAY = 0.9
MAX_TRACKED = 1024  # pairs of node and model whose pause is remembered
MIN_PAUSE_S = 0.001  # pieces with a shorter pause came together, so they say nothing about the server's pace


def silence_timeout_s(longest_s: float | None, *, reads_prompts: bool = False) -> float:
    """The longest silence of a stream, in seconds, before its node counts as lost. ``longest_s`` is the longest known
    pause between tokens; ``None`` if no pause is known. ``reads_prompts``: the server also reads other prompts now."""
    if longest_s is None:
        return DEFAULT_TIMEOUT_S
    shortest_s = DEFAULT_TIMEOUT_S if reads_prompts else MIN_TIMEOUT_S
    return min(max(shortest_s, PAUSE_FACTOR * longest_s), MAX_TIMEOUT_S)


class PauseTracker:
    """Remembers the longest pause between two pieces of an answer, by node and model. With more than ``MAX_TRACKED``
    entries, the entry whose last update is longest ago is dropped."""

    def __init__(self) -> None:
        self._longest: dict[tuple[str, str | None], float] = {}  # seconds, by node and model

    def longest_s(self, node: str, model: str | None) -> float | None:
        """The longest pause in seconds; ``None`` if no pause is known."""
        return self._longest.get((node, model))

    def learn(self, node: str, model: str | None, longest_s: float) -> None:
        """Updates the entry after a complete answer, whose longest pause was ``longest_s``."""
        key = (node, model)
        # ``pop``, so that the entry moves to the end: the dict is in the order of the updates.
        self._longest[key] = max(longest_s, PAUSE_DECAY * self._longest.pop(key, 0.0))
        while len(self._longest) > MAX_TRACKED:
            oldest_key = next(iter(self._longest))
            self._longest.pop(oldest_key)

    def forget(self, nodes: Collection[str]) -> None:
        """Forgets the pauses of these nodes."""
        self._longest = {key: pause_s for key, pause_s in self._longest.items() if key[0] not in nodes}


class WatchedStream(Protocol):
    """The stream of one node. ``waits_since``: when the wait for the next piece began. ``longest_wait_s``: the longest
    wait for a piece so far. The stream sets both at each token. ``backpressured``: the stream waits for its client."""

    waits_since: float
    longest_wait_s: float
    backpressured: bool

    def handle_silence(self, waited_s: float) -> bool:
        """Acts on a silence of so many seconds, which is too long. Returns whether the watch continues."""


class SilenceWatch:
    """Watches one node's stream."""

    __slots__ = ("_clock", "_model", "_node", "_pauses", "_timer")

    def __init__(self, pauses: PauseTracker, node: LeasedNode, model: str | None, clock: Callable[[], float]) -> None:
        self._pauses = pauses
        self._node = node
        self._model = model
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None  # runs until the next check

    def start(self, stream: WatchedStream) -> None:
        """Starts the watch. Only the timer refers to the stream, so that no cycle is left when the watch ends."""
        self._check_in(silence_timeout_s(self._longest_pause_s(stream)), stream)

    def stop(self) -> None:
        """Ends the watch. Does nothing after the watch has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def learn_pace(self, stream: WatchedStream) -> None:
        """Remembers the longest pause of this answer, which is complete, for later answers."""
        if stream.longest_wait_s > MIN_PAUSE_S:
            self._pauses.learn(self._node.name, self._model, stream.longest_wait_s)

    def _longest_pause_s(self, stream: WatchedStream) -> float | None:
        """The longest pause of earlier answers and of this answer; ``None`` if no pause is known."""
        longest_s = self._pauses.longest_s(self._node.name, self._model)
        if stream.longest_wait_s > MIN_PAUSE_S:
            longest_s = max(stream.longest_wait_s, longest_s or 0.0)
        return longest_s

    def _check_in(self, delay_s: float, stream: WatchedStream) -> None:
        """Schedules the next check."""
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._check, stream)

    def _check(self, stream: WatchedStream) -> None:
        """Tells the stream if its node has been silent for too long, and schedules the next check. While a slow client
        holds the stream up, the node is not silent."""
        self._timer = None
        longest_s = self._longest_pause_s(stream)
        # A server that hangs answers no probes, and reads nothing.
        reads_prompts = self._node.account.activity.reading > 0 and self._node.reachable
        timeout_s = silence_timeout_s(longest_s, reads_prompts=reads_prompts)
        waited_s = 0.0 if stream.backpressured else self._clock() - stream.waits_since
        usual_timeout_s = silence_timeout_s(longest_s)  # the other prompt may be read long before the longer time-out
        if waited_s < timeout_s:
            self._check_in(min(timeout_s - waited_s, usual_timeout_s), stream)
        elif stream.handle_silence(waited_s):
            self._check_in(usual_timeout_s, stream)
