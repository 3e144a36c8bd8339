from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from gpumesh.balancer.base import Demand
from gpumesh.gateway.access.quotas import MIN_ANSWER_TOKENS, SHORT_PROMPT_TOKENS, KeyQuotas
from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.http.errors import TooManyRequests
from gpumesh.gateway.usage.counts import Tokens
from gpumesh.topology import RequestRate

NOVEMBER_30 = datetime(2026, 11, 30, 23, 0, tzinfo=UTC).timestamp()
FORECAST = SHORT_PROMPT_TOKENS + MIN_ANSWER_TOKENS


@dataclass
class Clock:
    now: float

    def __call__(self) -> float:
        return self.now


class Quotas:
    """The quotas with fake clocks. ``stored`` are the tokens of a month by the store."""

    def __init__(self) -> None:
        self.clock = Clock(100.0)
        self.wall = Clock(NOVEMBER_30)
        self.stored: dict[tuple[str, str], int] = {}
        self.quotas = KeyQuotas(
            clock=self.clock, wall_clock=self.wall, read_tokens=lambda *key_month: self.stored.get(key_month, 0)
        )
        self.number = 0

    def admit(self, key: ClientKey, *, max_tokens: int | None = None, prompt_tokens: int | None = None) -> int:
        self.number += 1
        self.quotas.admit(self.number, key, Demand("m", max_tokens=max_tokens, prompt_tokens=prompt_tokens))
        return self.number

    def end(self, number: int, prompt: int = 0, answer: int = 0) -> None:
        self.quotas.settle(number, Tokens(prompt, answer))


def refused(quotas: Quotas, key: ClientKey, **more: int) -> TooManyRequests:
    with pytest.raises(TooManyRequests) as caught:
        quotas.admit(key, **more)
    assert caught.value.status == 429
    return caught.value


def test_a_rate_allows_so_many_at_once_and_then_evenly() -> None:
    quotas, key = Quotas(), ClientKey("a", "a", rate=RequestRate(3, 60.0))
    for _ in range(3):
        quotas.admit(key)
    error = refused(quotas, key)
    assert error.retry_after_s == pytest.approx(20.0)
    assert error.may_retry
    assert error.message == "the key a may ask 3 times in a minute"
    quotas.clock.now += 19.9
    assert refused(quotas, key).retry_after_s == pytest.approx(0.1)
    quotas.clock.now += 0.2
    quotas.admit(key)
    refused(quotas, key)
    quotas.clock.now += 3600.0  # no more than the bucket holds
    for _ in range(3):
        quotas.admit(key)
    refused(quotas, key)


def test_each_key_has_a_bucket_of_its_own_that_outlives_a_change_of_its_rate() -> None:
    quotas = Quotas()
    quotas.admit(ClientKey("a", "a", rate=RequestRate(1, 1.0)))
    quotas.admit(ClientKey("b", "b", rate=RequestRate(1, 1.0)))
    assert refused(quotas, ClientKey("a", "a", rate=RequestRate(100, 60.0))).retry_after_s == pytest.approx(0.6)
    quotas.admit(ClientKey("a", "a"))  # the limit is gone


def test_what_runs_no_model_counts_nothing() -> None:
    quotas, key = Quotas(), ClientKey("a", "a", rate=RequestRate(1, 1.0), tokens_per_month=1)
    for number in range(9):
        quotas.quotas.admit(f"show {number}", key, Demand("m", needs_slot=False))


def test_a_budget_is_used_up_until_the_next_month() -> None:
    quotas, key = Quotas(), ClientKey("a", "a", tokens_per_month=1000)
    quotas.end(quotas.admit(key), 300, 699)
    last = quotas.admit(key)  # the last request may go beyond
    quotas.end(last, 300, 700)
    quotas.end(last, 300, 700)  # a second end changes nothing
    error = refused(quotas, key)
    assert error.retry_after_s == 3600.0
    assert not error.may_retry
    assert error.message == (
        "the budget of the key a is used up: 1999 of 1000 tokens in 2026-11; it begins anew on 2026-12-01"
    )
    quotas.wall.now += 3600.0
    quotas.admit(key)


def test_what_was_used_before_the_start_counts() -> None:
    quotas, key = Quotas(), ClientKey("a", "a", tokens_per_month=1000)
    quotas.stored = {("a", "2026-11"): 1000, ("a", "2026-12"): 10}
    refused(quotas, key)
    quotas.wall.now += 3600.0
    quotas.end(quotas.admit(key), 500, 490)
    refused(quotas, key)


def test_requests_in_flight_reserve_what_they_may_use() -> None:
    quotas, key = Quotas(), ClientKey("a", "a", tokens_per_month=10 * FORECAST)
    numbers = [quotas.admit(key) for _ in range(10)]
    error = refused(quotas, key)
    assert error.may_retry
    assert error.retry_after_s < 10.0
    assert "is reserved for 10 requests in flight" in error.message
    for number in numbers:
        quotas.end(number, 1, 1)
    assert len([quotas.admit(key) for _ in range(9)]) == 9


@pytest.mark.parametrize(("limit", "admitted"), [(100, 10), (5000, 1)])
def test_the_requests_own_limit_is_reserved(limit: int, admitted: int) -> None:
    quotas, key = Quotas(), ClientKey("a", "a", tokens_per_month=10 * 150)
    for _ in range(admitted):
        quotas.admit(key, max_tokens=limit, prompt_tokens=50)
    refused(quotas, key, max_tokens=limit, prompt_tokens=50)


def test_a_long_answer_is_expected_again() -> None:
    quotas, key = Quotas(), ClientKey("a", "a", tokens_per_month=100_000)
    quotas.end(quotas.admit(key), 0, 40_000)
    quotas.admit(key)
    refused(quotas, key)
