from __future__ import annotations

import pytest

from gpumesh.balancer.outcomes import Outcome
from gpumesh.gateway.observe.record import Fate, Record, fate_of
from gpumesh.mesh.requests.answer import Answer
from gpumesh.topology import BackendKind


@pytest.mark.parametrize(
    ("outcome", "fate"),
    [
        (None, Fate.SERVED),
        (Outcome.SERVED, Fate.SERVED),
        (Outcome.CLIENT_ERROR, Fate.SERVED),
        (Outcome.CLIENT_GONE, Fate.CANCELLED),
        (Outcome.CUT, Fate.FAILED),
        (Outcome.DEADLINE, Fate.FAILED),
        (Outcome.UNREACHABLE, Fate.FAILED),
    ],
)
def test_fates_are_those_of_the_meshs_books(outcome: Outcome | None, fate: Fate) -> None:
    assert fate_of(outcome) is fate


def test_where_and_when_an_answer_began_is_kept() -> None:
    made = Record(lambda: 12.5, 10.0, "POST", "/api/chat")
    answer = Answer("a", BackendKind.OLLAMA, 200, ())
    made.answered(answer)
    answer.node = "b"
    assert (made.first, made.node) == (12.5, "a")
