"""``ClientCounters``: what each client of one class was served, for the Virtual Token Counter (VTC).

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024. The client that was served least goes
first. The counter of a client that comes back is raised to the level of the other clients, so that no client can save
up a right to many slots.
"""

from __future__ import annotations

from math import isfinite

# The weights of the paper: each token of an answer costs one step of decoding, while prompt tokens are read together.
PROMPT_TOKEN_WEIGHT = 1.0
ANSWER_TOKEN_WEIGHT = 2.0

# The greatest charge for one request: a prompt of a million tokens, and as many tokens of answer. No server serves more
# in one request, so a greater number is a defect or a lie.
MAX_CHARGE = 3_000_000.0

# A client that waited long for a busy model has a lower counter than clients that were served by other nodes meanwhile.
# When its turn comes, its counter is raised to at most MAX_LAG below theirs. Otherwise it would keep all slots for as
# long as it had waited. MAX_LAG is about ten usual requests (1,000 prompt tokens, 300 answer tokens).
MAX_LAG = 16_384.0

# Clients without a waiting request whose counters are kept. The client that was charged longest ago is forgotten first:
# it loses the least, because the counter of a client that comes back is raised in any case.
MAX_IDLE_CLIENTS = 4096


def weighted_tokens(prompt_tokens: float, answer_tokens: float) -> float:
    """The cost of a request in weighted tokens, the unit of all counters."""
    return prompt_tokens * PROMPT_TOKEN_WEIGHT + answer_tokens * ANSWER_TOKEN_WEIGHT


class ClientCounters:
    """The counters of the clients of one class, in weighted tokens; a counter shows how much its client was served.

    ``level`` is the counter that the client of the newest grant had before this grant. As the client that was served
    least goes first, nearly all clients that wait are at this level or above."""

    def __init__(self) -> None:
        self.level = 0.0
        self._waiting: dict[str, float] = {}  # the counters of the clients that wait, by name
        self._idle: dict[str, float] = {}  # in the order of the newest change

    def __len__(self) -> int:
        return len(self._waiting) + len(self._idle)

    def of(self, client: str) -> float:
        """The client's counter. A client that is not known is at the level."""
        counter = self._waiting.get(client)
        return self._idle.get(client, self.level) if counter is None else counter

    def start_waiting(self, client: str, least_competitor: float | None) -> float:
        """Notes the first waiting request of a client. Raises its counter to the level, or to ``least_competitor`` if
        this is lower: the least counter of its competitors (``None``: there are none). Returns the counter."""
        least_counter = self.level if least_competitor is None else min(self.level, least_competitor)
        counter = self._waiting[client] = max(self._idle.pop(client, least_counter), least_counter)
        return counter

    def stop_waiting(self, client: str) -> None:
        """The client has no waiting request any more."""
        self._set_idle(client, self._waiting.pop(client))

    def grant(self, client: str, tokens: float) -> float:
        """A waiting client gets a slot for a request of this expected cost. Returns its counter."""
        start = max(self._waiting[client], self.level - MAX_LAG)
        self.level = start
        counter = self._waiting[client] = start + bounded_charge(tokens)
        return counter

    def grant_unqueued(self, client: str, tokens: float) -> float:
        """A request of this expected cost got a slot without waiting. Returns the client's counter.

        Raises the client's counter at least to the level, and the level too. Otherwise the next client that must wait
        would be far behind a client that was served while no request waited, and would keep all slots for itself until
        it had caught up."""
        self.level = max(self.of(client), self.level)
        return self._set(client, self.level + bounded_charge(tokens))

    def charge(self, client: str, tokens: float) -> float:
        """Adds ``tokens``, which may be negative, to the client's counter. Returns the counter."""
        return self._set(client, self.of(client) + bounded_charge(tokens))

    def copy(self) -> ClientCounters:
        copy = ClientCounters()
        copy.level = self.level
        copy._waiting = self._waiting.copy()
        copy._idle = self._idle.copy()
        return copy

    def _set(self, client: str, counter: float) -> float:
        if client in self._waiting:
            self._waiting[client] = counter
        else:
            self._set_idle(client, counter)
        return counter

    def _set_idle(self, client: str, counter: float) -> None:
        self._idle.pop(client, None)  # so that the client moves to the end
        self._idle[client] = counter
        if len(self._idle) > MAX_IDLE_CLIENTS:
            del self._idle[next(iter(self._idle))]


def bounded_charge(tokens: float) -> float:
    """The charge within ``MAX_CHARGE``; zero for a number that is not finite."""
    return min(max(tokens, -MAX_CHARGE), MAX_CHARGE) if isfinite(tokens) else 0.0
