"""``KeyQuotas``: how often the holder of a key may ask a model, and how many tokens it may use in a month. Pure.

A key's rate is a bucket of requests: it holds as many as the rate has requests, and is filled again evenly over the
rate's period. Of a key's monthly budget, each request reserves its forecast at its start, and pays the tokens that it
has used at its end. So many requests at once cannot use what is left for one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from datetime import UTC, datetime

from gpumesh.balancer.base import Demand
from gpumesh.balancer.prefixes.cache_size import BYTES_PER_TOKEN
from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.http.errors import TooManyRequests
from gpumesh.gateway.model_requests import MIN_PROMPT_BYTES
from gpumesh.gateway.usage.counts import Tokens
from gpumesh.gateway.usage.report import next_month
from gpumesh.topology import RequestRate

# The prompt of a short body, and the answer to a request without a limit: so many tokens are reserved at least.
SHORT_PROMPT_TOKENS = int(MIN_PROMPT_BYTES // BYTES_PER_TOKEN)
MIN_ANSWER_TOKENS = 1024
RESERVED_RETRY_S = 2.0  # after this time, one of the requests that have reserved the rest of a budget may have ended
TokenReader = Callable[[str, str], int]
"""Returns how many tokens a key has used in a month (``2026-11``), in this process and before."""


class _KeyState:
    """What one key has used. ``reserved`` are the tokens of the requests in flight. ``longest_answer``: the most tokens
    of an answer so far. ``level``: how many requests the bucket held at the time ``filled_at``."""

    __slots__ = ("filled_at", "level", "longest_answer", "month", "requests", "reserved", "used")

    def __init__(self) -> None:
        self.month = ""
        self.used = 0
        self.reserved = 0
        self.requests = 0  # in flight, with a reservation
        self.longest_answer = MIN_ANSWER_TOKENS
        self.level = float("inf")  # full
        self.filled_at = 0.0


class KeyQuotas:
    """What the keys with limits have used. It outlives a change of the keys: a key is known by its name.

    ``clock`` returns monotonic seconds, ``wall_clock`` seconds since 1970. ``read_tokens`` is asked once for each key
    and month.
    """

    def __init__(
        self, *, clock: Callable[[], float], wall_clock: Callable[[], float], read_tokens: TokenReader = lambda *_: 0
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._read_tokens = read_tokens
        self._month = ""  # ``2026-11``
        self._month_ends_at = 0.0  # in seconds since 1970
        self._states: dict[str, _KeyState] = {}  # by the name of the key
        self._reservations: dict[Hashable, tuple[_KeyState, int]] = {}  # the reserved tokens of each request in flight

    def __repr__(self) -> str:
        return f"<KeyQuotas {len(self._states)} keys, {len(self._reservations)} requests in flight>"

    def admit(self, request: Hashable, key: ClientKey, demand: Demand) -> None:
        """Counts a request of this key, and reserves its tokens until ``settle`` is called with the same ``request``.
        Raises TooManyRequests if the key has used as much as it may. A request that runs no model counts nothing."""
        if not demand.needs_slot or key.name is None or request in self._reservations:
            return
        state = self._states.get(key.name)
        if state is None:
            state = self._states[key.name] = _KeyState()
        forecast = 0
        if key.tokens_per_month is not None:
            forecast = _forecast_tokens(demand, state)
            self._require_budget(key.name, state, key.tokens_per_month, forecast)
        if key.rate is not None:
            self._take_request(key.name, state, key.rate)
        state.reserved += forecast
        state.requests += 1
        self._reservations[request] = (state, forecast)

    def settle(self, request: Hashable, tokens: Tokens) -> None:
        """Ends the reservation of a request, and counts the tokens that it has used. Does nothing for a request that
        has none."""
        reservation = self._reservations.pop(request, None)
        if reservation is None:
            return
        state, forecast = reservation
        state.reserved -= forecast
        state.requests -= 1
        state.used += tokens.prompt + tokens.answer
        state.longest_answer = max(state.longest_answer, tokens.answer)

    # -- the budget of a month -----------------------------------------------------------------------------------

    def _require_budget(self, name: str, state: _KeyState, budget: int, forecast: int) -> None:
        """Raises TooManyRequests if the budget has no room for a request of ``forecast`` tokens. The last request of a
        budget may go beyond it."""
        now = self._wall_clock()
        if now >= self._month_ends_at:
            today = datetime.fromtimestamp(now, UTC)
            self._month, self._month_ends_at = f"{today:%Y-%m}", next_month(today).timestamp()
        if state.month != self._month:
            state.month, state.used = self._month, self._read_tokens(name, self._month)
        if state.used >= budget:
            renewed_on = datetime.fromtimestamp(self._month_ends_at, UTC)
            raise TooManyRequests(
                f"the budget of the key {name} is used up: {state.used} of {budget} tokens in {self._month};"
                f" it begins anew on {renewed_on:%Y-%m-%d}",
                retry_after_s=self._month_ends_at - now,
                may_retry=False,
            )
        if state.requests and state.used + state.reserved + forecast > budget:
            count = state.requests
            raise TooManyRequests(
                f"the rest of the budget of the key {name}, {budget - state.used} tokens, is reserved for"
                f" {count} request{'' if count == 1 else 's'} in flight",
                retry_after_s=RESERVED_RETRY_S,
            )

    # -- the rate ------------------------------------------------------------------------------------------------

    def _take_request(self, name: str, state: _KeyState, rate: RequestRate) -> None:
        """Takes one request out of the key's bucket. Raises TooManyRequests if the bucket holds less than one."""
        now = self._clock()
        per_s = rate.requests / rate.period_s
        level = min(state.level + max(now - state.filled_at, 0.0) * per_s, float(rate.requests))
        state.filled_at = now
        if level < 1.0:
            state.level = level
            raise TooManyRequests(
                f"the key {name} may ask {rate.requests} times in {_describe_period(rate.period_s)}",
                retry_after_s=(1.0 - level) / per_s,
            )
        state.level = level - 1.0


def _forecast_tokens(demand: Demand, state: _KeyState) -> int:
    """The most tokens that the request will probably use: its prompt by its length, and its answer by its own limit,
    or else as many as the longest answer of this key so far."""
    prompt = SHORT_PROMPT_TOKENS if demand.prompt_tokens is None else demand.prompt_tokens
    answer = state.longest_answer if demand.max_tokens is None else demand.max_tokens
    return prompt + answer


def _describe_period(seconds: float) -> str:
    return {1.0: "a second", 60.0: "a minute", 3600.0: "an hour", 86400.0: "a day"}.get(seconds, f"{seconds:g} s")
