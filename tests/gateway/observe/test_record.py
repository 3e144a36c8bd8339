from __future__ import annotations

import pytest

from gpumesh.balancer.outcomes import Outcome
from gpumesh.gateway.observe.record import RequestOutcome, RequestRecord, request_outcome
from gpumesh.mesh.requests.answer import Answer
from gpumesh.topology import BackendKind


@pytest.mark.parametrize(
    ("outcome", "fate"),
    [
        (None, RequestOutcome.SERVED),
        (Outcome.SERVED, RequestOutcome.SERVED),
        (Outcome.CLIENT_ERROR, RequestOutcome.SERVED),
        (Outcome.CLIENT_GONE, RequestOutcome.CANCELLED),
        (Outcome.CUT, RequestOutcome.FAILED),
        (Outcome.DEADLINE, RequestOutcome.FAILED),
        (Outcome.UNREACHABLE, RequestOutcome.FAILED),
    ],
)
def test_fates_are_those_of_the_meshs_books(outcome: Outcome | None, fate: RequestOutcome) -> None:
    assert request_outcome(outcome) is fate


def test_where_and_when_an_answer_began_is_kept() -> None:
    made = RequestRecord(lambda: 12.5, 10.0, "POST", "/api/chat")
    answer = Answer("a", BackendKind.OLLAMA, 200, ())
    made.note_answer(answer)
    answer.node = "b"
    assert (made.first_byte_at, made.node) == (12.5, "a")
