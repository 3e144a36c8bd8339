from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.outcomes import Outcome
from gpumesh.mesh.requests.answer import Answer, WholeAnswer
from gpumesh.topology import BackendKind


def answer(body: bytes) -> WholeAnswer:
    return WholeAnswer("a", BackendKind.OLLAMA, 200, (("x", "y"),), body, ServerCounters(tokens=3))


async def test_a_whole_answer_is_given_once() -> None:
    whole = answer(b"{}")
    assert whole.body == b"{}"
    assert await whole.read() == b"{}"
    assert await whole.read() == b""
    assert [piece async for piece in answer(b"")] == []
    assert whole.counters == ServerCounters(tokens=3)
    assert whole.error_frame("x") is None
    await whole.aclose()


async def test_the_end_is_told_once() -> None:
    class Ending(Answer):
        def end(self, outcome: Outcome) -> None:
            self._report_outcome(outcome)

    told: list[Outcome] = []
    ending = Ending("a", BackendKind.OLLAMA, 200, ())
    ending.on_outcome = told.append
    ending.end(Outcome.CUT)
    ending.end(Outcome.SERVED)
    assert told == [Outcome.CUT]
    assert ending.body is None
    assert ending.counters is None
