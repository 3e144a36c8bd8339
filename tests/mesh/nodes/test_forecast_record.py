"""What a node's record keeps of forecasts and loads, and the parts of the node's state that are made of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.forecast import Forecast
from gpumesh.balancer.scheduling.scheduler import Placement
from gpumesh.balancer.work import Work
from gpumesh.mesh.nodes.forecast_record import (
    LOADING_WINDOW_S,
    MAX_LOAD_EVENTS,
    MAX_MODELS,
    RATIO_BOUNDS,
    RECENT_REQUESTS,
    ForecastRecord,
)
from gpumesh.mesh.nodes.scheduling_snapshot import decision_states, learned_states, loading_state
from gpumesh.state import LearnedState, LoadingState, ModelLoadsState
from tests.balancer.placed import make_placed

MODEL = "qwen2.5:7b"


def placement(
    now: float,
    *,
    model: str = MODEL,
    context: int | None = None,
    load_s: float = 0.0,
    write_s: float = 2.0,
    drain_s: float | None = None,
    pushed_out: Sequence[str] = (),
) -> Placement:
    """A request that was placed at ``now``; it causes a load if ``load_s`` is above 0."""
    forecast = Forecast(
        "one", True, 0.0, 0.0, load_s, 0.0, write_s, 0.0, 0.0, 100.0, 0.0, tuple(pushed_out), load_s + write_s
    )
    placed = make_placed(
        NodeAccount("one"),
        Demand(model, residency=ResidencyKey(model, context)),
        Work(400.0, 80.0),
        now=now,
        cached_tokens=300.0,
        write_s=write_s,
        drain_s=(drain_s or 0.0) if load_s > 0.0 else None,
    )
    return Placement(placed, forecast, (forecast,))


def load(record: ForecastRecord, now: float, **changes: object) -> None:
    """A request that makes the server load its model for 4 s, by the server's own figure."""
    made = placement(now, load_s=5.0, **changes)  # type: ignore[arg-type]
    record.note_placed(made)
    record.note_end(made, now + 6.0, ServerCounters(load_ms=4000.0), is_answered=True)


def test_forecast_and_actual_times_of_answered_requests_are_summed() -> None:
    record = ForecastRecord()
    for started_at, took_s in ((0.0, 1.0), (10.0, 2.0), (20.0, 9.0)):
        made = placement(started_at)
        record.note_placed(made)
        record.note_end(made, started_at + took_s, ServerCounters(cached_tokens=250), is_answered=True)
    assert (record.forecast_s, record.actual_s) == (6.0, 12.0)
    assert sum(record.ratios.counts) == 3
    assert record.ratios.counts[RATIO_BOUNDS.index(0.5)] == 1
    assert record.ratios.counts[-1] == 1, "4.5 is beyond the last bound"
    assert record.ratios.sum == pytest.approx(0.5 + 1.0 + 4.5)
    assert (record.cached_tokens, record.reported_cached_tokens) == (900.0, 750)
    assert not record.loads


def test_a_request_without_a_whole_answer_shows_nothing_about_forecasts() -> None:
    record = ForecastRecord()
    made = placement(0.0)
    record.note_placed(made)
    record.note_end(made, 100.0, None, is_answered=False)
    assert (record.forecast_s, record.actual_s, sum(record.ratios.counts)) == (0.0, 0.0, 0)
    assert decision_states(record, 100.0) == ()


def test_the_latest_requests_are_shown_with_their_forecast() -> None:
    record = ForecastRecord()
    for second in range(10):
        made = placement(float(second))
        record.note_end(made, second + 1.5, None, is_answered=True)
    states = decision_states(record, 12.0)
    assert len(states) == RECENT_REQUESTS
    assert [state.age_s for state in states] == [1.5, 2.5, 3.5]
    assert (states[0].model, states[0].forecast_s, states[0].actual_s) == (MODEL, 2.0, 1.5)
    assert states[0].why == "0.0 way + 0.0 wait + 0.0 read 100 of 400 + 2.0 write"


def test_loads_are_counted_with_the_servers_time_and_what_they_push_out() -> None:
    record = ForecastRecord()
    load(record, 0.0, pushed_out=["llama3.1:8b"], drain_s=1.0)
    load(record, 20.0, context=8192)
    assert record.loads == {MODEL: 2}
    assert record.pushed_out == {"llama3.1:8b": 1}
    assert record.load_s == 7.0, "the wait for the other model is no loading"
    models = (ModelLoadsState(MODEL, 2, (None, 8192)),)
    assert loading_state(record, 40.0) == LoadingState(40.0, 7.0, 2, models)


def test_a_load_that_runs_counts_for_what_it_has_taken_so_far() -> None:
    record = ForecastRecord()
    made = placement(0.0, load_s=5.0)
    record.note_placed(made)
    for now, taken_s in ((3.0, 3.0), (60.0, 5.0)):  # never more than it was to take: it may have ended
        state = loading_state(record, now)
        assert state is not None
        assert (state.load_s, state.loads) == (taken_s, 1)
    assert record.loads == {}, "it has not ended"
    record.note_end(made, 60.0, None, is_answered=False)
    assert (record.loads, record.load_s) == ({MODEL: 1}, 5.0)


def test_a_load_that_was_not_expected_is_counted_once() -> None:
    record = ForecastRecord()
    for load_ms, loads in ((40.0, {}), (3000.0, {MODEL: 1}), (2900.0, {MODEL: 1})):
        made = placement(10.0)
        record.note_placed(made)
        record.note_end(made, 15.0, ServerCounters(load_ms=load_ms), is_answered=True)
        assert record.loads == loads
    later = placement(20.0)
    record.note_end(later, 22.0, ServerCounters(load_ms=1e9), is_answered=True)
    assert (record.loads, record.load_s) == ({MODEL: 2}, 5.0)


def test_a_request_that_was_not_sent_has_loaded_nothing() -> None:
    record = ForecastRecord()
    made = placement(0.0, load_s=5.0)
    record.note_placed(made)
    record.note_discarded(made)
    record.note_discarded(placement(0.0))
    assert loading_state(record, 1.0) is None
    assert record.loads == {}


@pytest.mark.parametrize("load_ms", [-5.0, 1e12, float("nan"), float("inf")])
def test_a_server_that_lies_about_a_load_is_bounded_by_the_clock(load_ms: float) -> None:
    record = ForecastRecord()
    made = placement(0.0, load_s=5.0)
    record.note_placed(made)
    record.note_end(made, 6.0, ServerCounters(load_ms=load_ms), is_answered=True)
    assert 0.0 <= record.load_s <= 6.0


def test_old_loads_are_forgotten_and_everything_is_bounded() -> None:
    record = ForecastRecord()
    for number in range(2 * MAX_LOAD_EVENTS):
        load(record, number * 0.1, model=f"model-{number}")
    assert len(record.loads) == MAX_MODELS + 1
    assert sum(record.loads.values()) == 2 * MAX_LOAD_EVENTS
    state = loading_state(record, 60.0)
    assert state is not None
    assert state.loads == MAX_LOAD_EVENTS
    assert state.load_s <= state.window_s
    assert len(state.models) <= 8
    assert loading_state(record, 60.0 + LOADING_WINDOW_S) is None


def test_learned_figures_are_those_that_were_measured() -> None:
    account = NodeAccount("one")
    assert learned_states(account) == ()
    account.learns_limit = True
    for _ in range(20):
        account.rates.learn(MODEL, tokens=100, eval_s=1.0, unread_tokens=3000, prompt_s=1.0, load_s=4.0)
    account.rates.learn("embedder:latest", load_s=1.0)
    embedder, qwen = learned_states(account)
    assert embedder == LearnedState("embedder:latest", load_s=1.0)
    assert qwen.model == MODEL
    assert qwen.tokens_per_s == pytest.approx(100.0, rel=0.01)
    assert qwen.prefill_tokens_per_s == pytest.approx(3000.0, rel=0.01)
    assert qwen.load_s == 4.0
    assert qwen.slots is None, "nothing has shown them"
    assert qwen.neighbour_share is None, "no answer had a neighbour"
    for _ in range(20):
        account.rates.learn(MODEL, tokens=100, eval_s=1.5, mean_streams=2.0)
    assert learned_states(account)[1].neighbour_share == pytest.approx(0.5, abs=0.05)
    account.max_parallel = 6
    assert [state.slots for state in learned_states(account)] == [6, 6]
