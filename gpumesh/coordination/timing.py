"""``Timing``: the intervals and time-outs of a coordination, in seconds. ``AnswerTimes``: whether Redis is slow."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

SLOW_S = 0.02  # a request on a shared node waits for one or two answers before it is sent
COUNTED_ANSWERS = 10


@dataclass(frozen=True, slots=True)
class Timing:
    """- ``heartbeat_s``: at least so often a gateway tells everything that it holds and wants.
    - ``dead_s``: a gateway that is silent for longer is dead, and its places are free. So they are free at most
      ``dead_s + heartbeat_s`` after its end.
    - ``own_s``: for so long after a step was sent, a gateway that uses a key alone may rely on the answer. It is less
      than ``dead_s``: a gateway that was stopped asks again before it takes a place that may belong to another by now.
    - ``share_s``: after the last use by other gateways, a gateway may use a key alone.
    - ``answer_s``: when Redis has not answered for so long, the gateway goes on alone.
    - ``connect_s``: the time-out of a connection, with its handshake.
    - ``owner_s``: so long a new request waits until the gateway that uses its key alone has shared it.
    - ``release_s``: a place that is given back, and for which nobody is known to wait, is told with the next step, at
      the latest after this time. So it mostly goes with the next request's step, and never delays an answer.
    - ``forget_s``: a key that this gateway has not used for so long is forgotten.
    - ``first_pause_s`` and ``max_pause_s``: between two attempts to connect; each pause doubles."""

    heartbeat_s: float = 1.0
    dead_s: float = 3.5
    own_s: float = 2.5
    share_s: float = 10.0
    answer_s: float = 0.3
    connect_s: float = 2.0
    owner_s: float = 0.3
    release_s: float = 0.001
    forget_s: float = 60.0
    first_pause_s: float = 0.5
    max_pause_s: float = 2.0


DEFAULT_TIMING = Timing()


class AnswerTimes:
    """The times in seconds that the last answers of Redis took."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=COUNTED_ANSWERS)

    def __repr__(self) -> str:
        return f"<AnswerTimes least {self.least_s}>"

    def note(self, seconds: float) -> None:
        self._last.append(seconds)

    @property
    def least_s(self) -> float | None:
        """The shortest of the last ``COUNTED_ANSWERS``; ``None`` before there were so many. Not a mean: a busy event
        loop makes some answers look slow, a Redis that is far away or overloaded all of them."""
        return min(self._last) if len(self._last) == COUNTED_ANSWERS else None
