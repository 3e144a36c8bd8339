"""The scenario ``load``: which requests it sends, and when."""

from __future__ import annotations

from random import Random

import pytest

from gpumesh.backends.base import Message
from gpumesh.bench.scenarios.base import NodeFacts, ScenarioContext, StageOutcome
from gpumesh.bench.scenarios.load import measure_load
from gpumesh.bench.workload.arrivals import ArrivalProcess
from gpumesh.bench.workload.lengths import parse_lengths
from gpumesh.bench.workload.prompts import OwnPrompt, PromptFactory
from gpumesh.bench.workload.settings import BenchSettings
from gpumesh.bench.workload.stages import Stage, StageKind
from gpumesh.errors import UsageError


def context_of(settings: BenchSettings, own_prompts: tuple[OwnPrompt, ...] = ()) -> ScenarioContext:
    nodes = (NodeFacts("alpha"), NodeFacts("beta"))
    return ScenarioContext(settings, nodes, PromptFactory(settings, Random(7)), own_prompts=own_prompts)


def stages_of(context: ScenarioContext, *durations_s: float) -> list[Stage]:
    """The stages that the scenario asks for, if they take so long."""
    steps = measure_load(context)
    stages = [next(steps)]
    for duration_s in durations_s:
        try:
            stages.append(steps.send(StageOutcome((), duration_s=duration_s)))
        except StopIteration:
            break
    return stages


def test_a_rate_is_an_open_loop_for_its_time() -> None:
    settings = BenchSettings("m", rate=5.0, arrivals=ArrivalProcess.CONSTANT, duration_s=2.0)
    (stage,) = stages_of(context_of(settings))
    assert (stage.kind, stage.open_loop) == (StageKind.TRACE, True)
    assert [request.at_s for request in stage.requests] == [number / 5 for number in range(10)]
    assert len({request.chat.messages for request in stage.requests}) == 10, "each prompt has a nonce of its own"


def test_two_runs_have_the_same_arrivals() -> None:
    settings = BenchSettings("m", rate=5.0, requests=20)
    first, second = (stages_of(context_of(settings))[0] for _ in range(2))
    assert [request.at_s for request in first.requests] == [request.at_s for request in second.requests]
    assert len(first.requests) == 20


def test_a_closed_loop_of_so_many_requests() -> None:
    (stage,) = stages_of(context_of(BenchSettings("m", requests=7, concurrency=(3,))))
    assert (stage.concurrency, len(stage.requests), stage.duration_s) == (3, 7, None)


def test_a_closed_loop_for_a_time_has_requests_to_spare() -> None:
    context = context_of(BenchSettings("m", concurrency=(4,), duration_s=60.0))
    trial, stage = stages_of(context, 2.0, 61.0)
    assert (trial.kind, len(trial.requests), trial.concurrency) == (StageKind.WARM_UP, 4, 4)
    assert (stage.duration_s, stage.concurrency) == (60.0, 4)
    assert 4 * 30 < len(stage.requests) <= 4 * 50
    assert not context.notes


def test_a_closed_loop_that_ran_out_of_requests_says_so() -> None:
    context = context_of(BenchSettings("m", concurrency=(4,), duration_s=60.0))
    stages_of(context, 2.0, 40.0)
    assert ["had been sent after 40 s" in note for note in context.notes] == [True]


def test_own_prompts_are_sent_as_they_are_again_and_again() -> None:
    own = (
        OwnPrompt((Message("system", "be short"), Message("user", "one")), {"num_predict": 3}),
        OwnPrompt((Message("user", "two"),)),
    )
    (stage,) = stages_of(context_of(BenchSettings("m", requests=5, tokens=9, concurrency=(1,)), own))
    sent = [request.chat for request in stage.requests]
    assert [chat.messages[-1].content for chat in sent] == ["one", "two", "one", "two", "one"]
    assert [chat.options["num_predict"] for chat in sent[:2]] == [3, 9]
    assert sent[0].options["seed"] == 1


def test_lengths_are_drawn_for_each_request() -> None:
    settings = BenchSettings(
        "m", requests=200, answer_lengths=parse_lengths("5-9"), prompt_lengths=parse_lengths("10-100")
    )
    (stage,) = stages_of(context_of(settings))
    assert {request.chat.options["num_predict"] for request in stage.requests} == {5, 6, 7, 8, 9}
    assert len({len(request.chat.messages[0].content.split()) for request in stage.requests}) > 20


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        (BenchSettings("m", rate=0.0), "--rate"),
        (BenchSettings("m", rate=float("inf")), "--rate"),
        (BenchSettings("m", duration_s=-1.0), "--duration"),
        (BenchSettings("m", burst=0), "--burst"),
    ],
)
def test_a_shape_that_makes_no_sense(settings: BenchSettings, option: str) -> None:
    with pytest.raises(UsageError, match=option):
        settings.check()


def test_conversations_share_a_system_prompt_and_have_turns() -> None:
    settings = BenchSettings("m", requests=6, turns=3, think_s=1.5, system_tokens=100, concurrency=(2,))
    (stage,) = stages_of(context_of(settings))
    assert [request.conversation for request in stage.requests] == [0, 0, 0, 1, 1, 1]
    assert stage.think_s == 1.5
    first, second = stage.requests[0].chat.messages, stage.requests[3].chat.messages
    assert [message.role for message in first] == ["system", "user"]
    assert first[0] == second[0], "all share it"
    assert first[1] != second[1]
    assert [message.role for message in stage.requests[1].chat.messages] == ["user"]


def test_the_rate_is_that_of_conversations() -> None:
    settings = BenchSettings("m", rate=2.0, arrivals=ArrivalProcess.CONSTANT, requests=4, turns=2)
    (stage,) = stages_of(context_of(settings))
    assert [request.at_s for request in stage.requests] == [0.0, None, 0.5, None]
