from __future__ import annotations

import pytest

from gpumesh.balancer.outcomes import Outcome, RequestOutcome
from gpumesh.gateway.observe.record import RequestRecord
from gpumesh.mesh.requests.answer import Answer, WholeAnswer
from gpumesh.topology import BackendKind


def make_record() -> RequestRecord:
    return RequestRecord(lambda: 12.5, 10.0, "POST", "/api/chat")


def test_node_and_time_of_the_answers_begin_are_kept() -> None:
    record = make_record()
    answer = Answer("a", BackendKind.OLLAMA, 200, ())
    record.note_answer(answer)
    answer.node = "b"
    assert (record.first_byte_at, record.node) == (12.5, "a")


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (None, RequestOutcome.SERVED),
        (Outcome.SERVED, RequestOutcome.SERVED),
        (Outcome.CLIENT_GONE, RequestOutcome.CANCELLED),
        (Outcome.CUT, RequestOutcome.FAILED),
    ],
)
def test_a_request_ends_as_its_answer_did(outcome: Outcome | None, expected: RequestOutcome) -> None:
    record = make_record()
    record.note_answer(Answer("a", BackendKind.OLLAMA, 200, ()))
    assert record.answer is not None
    record.answer.outcome = outcome
    record.note_end(status=200, sent_bytes=7)
    assert (record.outcome, record.ended_at, record.status, record.sent_bytes) == (expected, 12.5, 200, 7)


@pytest.mark.parametrize(
    ("status", "expected"),
    [(200, RequestOutcome.SERVED), (404, RequestOutcome.SERVED), (500, RequestOutcome.FAILED)],
)
def test_a_whole_answer_ends_by_its_status_as_in_the_meshs_counters(status: int, expected: RequestOutcome) -> None:
    record = make_record()
    record.note_answer(WholeAnswer("a", BackendKind.OLLAMA, status, (), b"{}"))
    record.note_end(status=status, sent_bytes=2)
    assert record.outcome is expected


@pytest.mark.parametrize(
    ("status", "reported_failure", "expected"),
    [
        (200, False, RequestOutcome.SERVED),
        (404, False, RequestOutcome.SERVED),
        (200, True, RequestOutcome.FAILED),
        (502, False, RequestOutcome.FAILED),
    ],
)
def test_a_reply_of_the_gateway_itself_is_judged_by_what_it_told(
    status: int, reported_failure: bool, expected: RequestOutcome
) -> None:
    record = make_record()
    record.note_end(status=status, sent_bytes=2, reported_failure=reported_failure)
    assert record.outcome is expected


def test_a_request_without_an_answer_has_the_node_that_got_it_last() -> None:
    record = make_record()
    record.progress.node = "b"
    record.note_client_gone(status=499, sent_bytes=0)
    assert record.node == "b"


def test_an_outcome_that_was_set_stands_unless_the_client_is_gone() -> None:
    record = make_record()
    record.outcome = RequestOutcome.REFUSED
    record.note_end(status=404, sent_bytes=0)
    assert record.outcome is RequestOutcome.REFUSED
    record.note_client_gone(status=499, sent_bytes=0)
    assert (record.outcome, record.status) == (RequestOutcome.CANCELLED, 499)
