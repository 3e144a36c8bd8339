"""A GPU that its streams share: prompts are read one after another, answers are generated at the same time. The more
answers, the slower is each of them.

Decoding is processor sharing: with k streams each token takes ``(1 + share * (k - 1))`` times as long. So all streams
slow down by the same factor, and one *virtual time* is enough for all of them: its speed is the speed of each stream
relative to a stream that runs alone. A stream that starts at the virtual time v and needs s seconds alone ends at the
virtual time v + s, even if other streams start or end meanwhile. So an event costs O(log k). (Virtual time: Zhang,
"VirtualClock", 1990; Parekh and Gallager, "Generalized processor sharing", 1993.)

Streams of different models share the GPU in the same way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

from gpumesh.bench.simulate.requests import Attempt

ROUNDING_S = 1e-9  # an event within this time counts as due, because sums of floating point numbers are not exact


class SharedGpu:
    """Reads prompts and generates answers. ``now`` is in seconds and never decreases. The figures are NodeSpec's.

    ``next_event_at``: the time at which the next prompt or answer is done if nothing else happens; infinite if nothing
    runs. ``decoded_s`` sums the virtual seconds that all streams have got, ``read_s`` the seconds of reading.
    """

    __slots__ = (
        "_decoding",
        "_lanes",
        "_prefills",
        "_sequence",
        "_share",
        "_speed",
        "_stall",
        "_virtual_at",
        "_virtual_s",
        "_waiting_prefills",
        "decoded_s",
        "factor",
        "next_event_at",
        "read_s",
    )

    def __init__(self, *, share: float, prefill_stall: float, prefill_lanes: int) -> None:
        self._share = share
        self._stall = prefill_stall
        self._lanes = prefill_lanes
        self.factor = 1.0  # multiplies all times: a fault makes the GPU slower
        self._virtual_s = 0.0  # the virtual time of all streams: see the module
        self._virtual_at = 0.0  # the time at which ``_virtual_s`` was computed
        self._speed = 0.0  # virtual seconds per second
        self._sequence = 0  # orders equal times: attempts cannot be compared
        self._decoding: list[tuple[float, int, Attempt]] = []  # a heap by the virtual time of the end
        self._prefills: list[tuple[float, int, Attempt]] = []  # a heap by the time of the end
        self._waiting_prefills: deque[Attempt] = deque()  # prompts for which no lane is free
        self.next_event_at = math.inf
        self.decoded_s = 0.0
        self.read_s = 0.0

    def __repr__(self) -> str:
        return f"<SharedGpu {len(self._decoding)} decoding, {len(self._prefills)} reading>"

    @property
    def decoding(self) -> int:
        """The number of streams that are generated."""
        return len(self._decoding)

    def start_prefill(self, attempt: Attempt, now: float) -> None:
        """Reads the attempt's prompt for ``attempt.prefill_s``, when a lane is free."""
        if len(self._prefills) >= self._lanes:
            self._waiting_prefills.append(attempt)
            return
        self._move(now)
        self._push_prefill(attempt, now)
        self._update()

    def _push_prefill(self, attempt: Attempt, now: float) -> None:
        """Starts to read the attempt's prompt now."""
        self._sequence += 1
        heappush(self._prefills, (now + attempt.prefill_s * self.factor, self._sequence, attempt))

    def advance(self, now: float) -> tuple[Sequence[Attempt], Sequence[Attempt]]:
        """Does all that is due at ``now``. Removes and returns the attempts whose prompts have been read, and the
        attempts whose answers are complete. For a prompt that has been read, the generation of its answer begins now,
        and takes ``attempt.decode_s``."""
        self._move(now)
        prefills, decoding = self._prefills, self._decoding
        read = self._finish_prefills(now) if prefills and prefills[0][0] <= now + ROUNDING_S else ()
        answered = self._finish_answers() if decoding and decoding[0][0] <= self._virtual_s + ROUNDING_S else ()
        self._update()
        return read, answered

    def _finish_prefills(self, now: float) -> list[Attempt]:
        """Ends the reading of the prompts that are due, starts their answers, and starts to read waiting prompts."""
        finished: list[Attempt] = []
        prefills = self._prefills
        while prefills and prefills[0][0] <= now + ROUNDING_S:
            attempt = heappop(prefills)[2]
            finished.append(attempt)
            self.read_s += attempt.prefill_s
            if self._waiting_prefills:
                self._push_prefill(self._waiting_prefills.popleft(), now)
            attempt.decode_from = self._virtual_s
            self._sequence += 1
            heappush(self._decoding, (self._virtual_s + attempt.decode_s, self._sequence, attempt))
        return finished

    def _finish_answers(self) -> list[Attempt]:
        """Removes and returns the attempts whose answers are complete."""
        finished: list[Attempt] = []
        decoding, due = self._decoding, self._virtual_s + ROUNDING_S
        while decoding and decoding[0][0] <= due:
            attempt = heappop(decoding)[2]
            finished.append(attempt)
            self.decoded_s += attempt.decode_s
        return finished

    def decoded_share(self, attempt: Attempt, now: float) -> float:
        """The share of the attempt's answer (0 to 1) that is generated at ``now``."""
        self._move(now)
        return min((self._virtual_s - attempt.decode_from) / attempt.decode_s, 1.0)

    def set_factor(self, factor: float, now: float) -> None:
        """Makes reading and decoding take ``factor`` times as long as without a fault."""
        self._move(now)
        change = factor / self.factor
        self.factor = factor
        # The order of the ends stays the same, so the list is still a heap.
        self._prefills = [(now + (at - now) * change, number, attempt) for at, number, attempt in self._prefills]
        self._update()

    def clear(self, now: float) -> None:
        """Forgets all attempts: the connection to the host is lost."""
        self._move(now)
        self._decoding.clear()
        self._prefills.clear()
        self._waiting_prefills.clear()
        self._update()

    def _move(self, now: float) -> None:
        """Brings the virtual time to ``now``."""
        self._virtual_s += (now - self._virtual_at) * self._speed
        self._virtual_at = now

    def _update(self) -> None:
        """Computes the speed and the next event again. ``_move`` must have been called for the present time."""
        decoding, prefills = self._decoding, self._prefills
        next_at = prefills[0][0] if prefills else math.inf
        speed = 0.0
        if decoding:
            speed = 1.0 / ((1.0 + self._share * (len(decoding) - 1)) * self.factor)
            if prefills:
                speed *= 1.0 - self._stall
            if speed > 0.0:
                remaining_s = decoding[0][0] - self._virtual_s
                answer_at = self._virtual_at + remaining_s / speed if remaining_s > 0.0 else self._virtual_at
                next_at = min(next_at, answer_at)
        self._speed = speed
        self.next_event_at = next_at

    def snapshot(self, now: float) -> tuple[list[tuple[float, Attempt]], list[tuple[float, Attempt]]]:
        """The work that is left at ``now``, in two lists: for each prompt the seconds that its reading still takes, in
        the order of reading; for each stream the seconds that the rest of the answer would take alone.

        A fault that makes the GPU slower is not counted. For the reference policy only: no gateway can know this.
        """
        self._move(now)
        prefills = [((at - now) / self.factor, attempt) for at, _, attempt in sorted(self._prefills)]
        prefills += [(attempt.prefill_s, attempt) for attempt in self._waiting_prefills]
        return prefills, [(end - self._virtual_s, attempt) for end, _, attempt in self._decoding]
