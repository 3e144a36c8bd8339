import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.outcomes import (
    MAX_ROUNDS,
    Outcome,
    RequestOutcome,
    classify_status,
    is_retryable,
    request_outcome,
    retry_delay_s,
    rule_for_outcome,
)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Outcome.SERVED),
        (206, Outcome.SERVED),
        (400, Outcome.CLIENT_ERROR),
        (401, Outcome.CLIENT_ERROR),
        (403, Outcome.CLIENT_ERROR),
        (404, Outcome.MODEL_NOT_FOUND),
        (413, Outcome.CLIENT_ERROR),
        *((status, Outcome.PROXY_REFUSED) for status in (407, 408, 421, 425)),
        (429, Outcome.BUSY),
        (499, Outcome.CLIENT_ERROR),
        (500, Outcome.SERVER_ERROR),
        (502, Outcome.SERVER_ERROR),
        (503, Outcome.SERVER_ERROR),
        (504, Outcome.SERVER_ERROR),
        (501, Outcome.NOT_SUPPORTED),
        (529, Outcome.BUSY),
        *((status, Outcome.SERVER_ERROR) for status in (505, 507, 508, 509, 511, *range(520, 529), 530, 598, 599, 999)),
    ],
)
def test_outcome_of_each_status(status: int, outcome: Outcome) -> None:
    assert classify_status(status, model_asked=True) is outcome


@given(st.integers(500, 999))
def test_every_status_of_a_failed_server_or_proxy_moves_the_request_on(status: int) -> None:
    for model_asked in (True, False):
        assert rule_for_outcome(classify_status(status, model_asked=model_asked)).fail_over


def test_404_without_a_model_is_the_clients_error() -> None:
    assert classify_status(404, model_asked=False) is Outcome.CLIENT_ERROR


def test_every_outcome_has_a_rule_and_only_faults_of_the_node_count_against_it() -> None:
    faults = {outcome for outcome in Outcome if rule_for_outcome(outcome).counts_against_node}
    assert faults == {Outcome.SERVER_ERROR, Outcome.UNREACHABLE, Outcome.TIMED_OUT, Outcome.CUT, Outcome.STREAM_ERROR}
    for outcome in Outcome:
        assert rule_for_outcome(outcome).fail_over or not rule_for_outcome(outcome).counts_against_node


def test_every_outcome_of_an_attempt_is_one_of_a_request() -> None:
    served = {outcome for outcome in Outcome if request_outcome(outcome) is RequestOutcome.SERVED}
    cancelled = {outcome for outcome in Outcome if request_outcome(outcome) is RequestOutcome.CANCELLED}
    assert served == {Outcome.SERVED, Outcome.CLIENT_ERROR}
    assert cancelled == {Outcome.CLIENT_GONE}
    assert {request_outcome(outcome) for outcome in set(Outcome) - served - cancelled} == {RequestOutcome.FAILED}


def test_a_node_is_asked_again_only_after_a_failure_that_may_pass() -> None:
    again = {outcome for outcome in Outcome if is_retryable(outcome)}
    assert again == {Outcome.UNREACHABLE, Outcome.TIMED_OUT, Outcome.CUT, Outcome.STREAM_ERROR, Outcome.BUSY}
    assert all(rule_for_outcome(outcome).fail_over for outcome in again)


def test_the_tunnel_is_checked_only_where_it_may_be_what_failed() -> None:
    suspects = {outcome for outcome in Outcome if rule_for_outcome(outcome).check_tunnel}
    assert suspects == {Outcome.UNREACHABLE, Outcome.TIMED_OUT, Outcome.CUT}


def test_pauses_grow_and_stay_below_two_seconds_in_all() -> None:
    rng = random.Random(3)
    assert sum(retry_delay_s(number, rng) for number in range(1, MAX_ROUNDS)) < 2.0
