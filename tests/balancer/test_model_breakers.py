"""The breakers of a node's models, and which breaker an outcome counts for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.breaker import (
    FAILED_MODELS_OPEN_NODE,
    MAX_MODEL_FAULTS,
    MISSING_PACE,
    MODEL_PACE,
    SERVED_LATELY_S,
    ModelBreakers,
)
from gpumesh.balancer.outcomes import AttemptContext, Blame, ErrorReply, Outcome, find_blame
from gpumesh.state import ModelInfo

TOO_LARGE = "model requires more system memory (7.5 GiB) than is available (5.2 GiB)"
M = "m:latest"
LIST = (ModelInfo("m:latest", "d1", modified_at="2026-01-01"), ModelInfo("n:latest", "d2"))


def blame(outcome: Outcome, reply: ErrorReply | None, *, loaded: bool | None = True, slot: bool = True) -> Blame:
    return find_blame(outcome, AttemptContext(takes_slot=slot, model=M, was_loaded=loaded, reply=reply))


# -- blame -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [True, False, None])
@pytest.mark.parametrize("outcome", [Outcome.SERVER_ERROR, Outcome.STREAM_ERROR])
def test_a_model_that_cannot_be_loaded_is_blamed_not_its_node(outcome: Outcome, loaded: bool | None) -> None:
    assert blame(outcome, ErrorReply(500, TOO_LARGE), loaded=loaded) is Blame.MODEL_LOAD


def test_500_without_a_reason_is_the_models_fault_only_if_it_was_not_in_memory() -> None:
    reply = ErrorReply(500, "model runner has unexpectedly stopped")
    assert blame(Outcome.SERVER_ERROR, reply, loaded=False) is Blame.MODEL
    assert blame(Outcome.SERVER_ERROR, reply, loaded=True) is Blame.NODE
    assert blame(Outcome.SERVER_ERROR, reply, loaded=None) is Blame.NODE, "this server does not tell what is loaded"
    assert blame(Outcome.STREAM_ERROR, reply, loaded=False) is Blame.NODE, "its answer had begun: it was loaded"


@pytest.mark.parametrize("status", [502, 503, 504, 522, 599])
def test_what_a_proxy_says_is_about_the_node(status: int) -> None:
    assert blame(Outcome.SERVER_ERROR, ErrorReply(status, "bad gateway"), loaded=False) is Blame.NODE


def test_a_web_page_with_500_is_no_answer_about_the_model() -> None:
    reply = ErrorReply(500, "HTTP 500 and a web page", foreign="it answered 500 with text/html")
    assert blame(Outcome.SERVER_ERROR, reply, loaded=False) is Blame.NODE


@pytest.mark.parametrize("outcome", [Outcome.UNREACHABLE, Outcome.TIMED_OUT, Outcome.CUT])
def test_a_lost_answer_is_the_nodes_fault(outcome: Outcome) -> None:
    assert blame(outcome, None, loaded=False) is Blame.NODE


def test_only_a_404_about_the_model_counts() -> None:
    assert blame(Outcome.MODEL_NOT_FOUND, ErrorReply(404, "model 'm' not found")) is Blame.MISSING_MODEL
    assert blame(Outcome.MODEL_NOT_FOUND, ErrorReply(404, "404 page not found")) is Blame.NOBODY
    assert blame(Outcome.MODEL_NOT_FOUND, None) is Blame.NOBODY
    assert blame(Outcome.MODEL_NOT_FOUND, ErrorReply(404, "model 'm' not found"), slot=False) is Blame.NOBODY


def test_a_request_to_the_model_store_blames_no_model() -> None:
    assert blame(Outcome.SERVER_ERROR, ErrorReply(500, TOO_LARGE), slot=False) is Blame.NOBODY
    assert blame(Outcome.UNREACHABLE, None, slot=False) is Blame.NODE


@pytest.mark.parametrize(
    "outcome", [Outcome.CLIENT_GONE, Outcome.CLIENT_ERROR, Outcome.BUSY, Outcome.NOT_SUPPORTED, Outcome.DEADLINE]
)
def test_what_is_nobodys_fault(outcome: Outcome) -> None:
    assert blame(outcome, ErrorReply(429, TOO_LARGE), loaded=False) is Blame.NOBODY


# -- a model that cannot be loaded -----------------------------------------------------------------------------------


def test_a_failed_load_takes_the_model_away_at_once_and_nothing_else() -> None:
    models = ModelBreakers()
    assert not models.record_failure(M, Blame.MODEL_LOAD, TOO_LARGE, 0.0)
    assert models.broken(0.0) == {M}
    assert models.pause_left(M, 1.0) == MODEL_PACE.first_open_s - 1.0
    assert models.pause_left("n:latest", 1.0) is None
    (fault,) = models.open_faults
    assert (fault.model, fault.message) == (M, TOO_LARGE)


def test_after_the_pause_one_trial_decides() -> None:
    models = ModelBreakers()
    models.record_failure(M, Blame.MODEL_LOAD, TOO_LARGE, 0.0)
    now = MODEL_PACE.first_open_s
    assert not models.broken(now)
    models.record_start(M, now)
    assert models.broken(now) == {M}, "one trial at a time"
    assert models.pause_left(M, now) == 0.0
    models.record_failure(M, Blame.MODEL_LOAD, TOO_LARGE, now)
    assert models.pause_left(M, now) == 2 * MODEL_PACE.first_open_s
    now += 2 * MODEL_PACE.first_open_s
    models.record_start(M, now)
    assert models.cancel_trial(M)
    assert not models.broken(now), "the client left: the next may try"
    models.record_success(M, now)
    assert models.open_faults == ()


def test_a_model_that_was_served_lately_is_not_taken_away_by_one_request() -> None:
    """A request with a huge ``num_ctx`` must not take the model away from all others."""
    models = ModelBreakers()
    models.record_success(M, 0.0)
    models.record_failure(M, Blame.MODEL_LOAD, TOO_LARGE, 1.0)
    models.record_failure(M, Blame.MODEL_LOAD, TOO_LARGE, 1.0)
    assert not models.broken(1.0)
    models.record_failure(M, Blame.MODEL_LOAD, TOO_LARGE, 1.0)
    assert models.broken(1.0) == {M}
    models = ModelBreakers()
    models.record_success(M, 0.0)
    models.record_failure(M, Blame.MODEL_LOAD, TOO_LARGE, SERVED_LATELY_S)
    assert models.broken(SERVED_LATELY_S) == {M}


def test_nor_is_a_model_that_was_in_memory() -> None:
    models = ModelBreakers()
    for _ in range(3):
        assert not models.broken(0.0)
        models.record_failure(M, Blame.MODEL_LOAD, TOO_LARGE, 0.0, was_loaded=True)
    assert models.broken(0.0) == {M}


def test_without_a_reason_it_takes_three_failures_and_can_be_overruled() -> None:
    models = ModelBreakers()
    for _ in range(3):
        assert not models.broken(0.0)
        models.record_failure(M, Blame.MODEL, "oops", 0.0)
    assert models.broken(0.0) == {M}
    assert models.broken(0.0, despite_doubt=True) == set()
    models.record_failure("n:latest", Blame.MODEL_LOAD, TOO_LARGE, 0.0)
    assert models.broken(0.0, despite_doubt=True) == {"n:latest"}


def test_three_different_models_in_a_row_make_the_node_suspect() -> None:
    models = ModelBreakers()
    names = [f"m{number}:latest" for number in range(FAILED_MODELS_OPEN_NODE + 1)]
    assert [models.record_failure(name, Blame.MODEL_LOAD, "", 0.0) for name in names] == [False, False, True, True]
    assert not models.record_failure(names[0], Blame.MODEL_LOAD, "", 0.0), "it says nothing new about the node"
    models.record_success("n:latest", 0.0)
    assert not models.record_failure(names[0], Blame.MODEL_LOAD, "", 0.0), "the node has served another model"
    missing = ModelBreakers()
    missing.note_catalog(LIST)
    assert not any(missing.record_failure(name, Blame.MISSING_MODEL, "", 0.0) for name in names)


def test_a_forgiven_failure_leaves_nothing() -> None:
    models = ModelBreakers()
    models.record_failure(M, Blame.MODEL, "", 0.0)
    models.forgive_failure(M, 0.0)
    models.forgive_failure("n:latest", 0.0)
    assert models.find_fault(M) is None
    assert repr(models) == "<ModelBreakers no fault>"


# -- a model that is listed and not there ----------------------------------------------------------------------------


def test_a_missing_model_stays_away_until_the_list_changes() -> None:
    models = ModelBreakers()
    models.note_catalog(LIST)
    models.record_failure(M, Blame.MISSING_MODEL, "model 'm' not found", 0.0)
    assert models.broken(MISSING_PACE.first_open_s - 1.0) == {M}
    assert not models.open_faults[0].confirmed, "the list may be older than the answer"
    models.note_catalog(tuple(reversed(LIST)))
    assert models.open_faults[0].confirmed
    assert models.broken(1.0) == {M}, "the order of a list means nothing"
    models.note_catalog((ModelInfo("m:latest", "d1", modified_at="2026-01-02"), LIST[1]))
    assert not models.broken(1.0), "it was pulled again"


def test_a_server_that_lists_nothing_cannot_contradict_itself() -> None:
    models = ModelBreakers()
    models.record_failure(M, Blame.MISSING_MODEL, "", 0.0)
    assert not models.broken(0.0)


# -- bounds ----------------------------------------------------------------------------------------------------------

MODEL_BLAMES = (Blame.MODEL, Blame.MODEL_LOAD, Blame.MISSING_MODEL)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["start", "ok", "cancel", "forgive", "list", *MODEL_BLAMES]),
        st.integers(0, 2 * MAX_MODEL_FAULTS),
        st.floats(0, 400),
    ),
    max_size=300,
)


@given(STEPS)
def test_it_is_bounded_and_no_model_stays_away_for_ever(steps: list[tuple[str, int, float]]) -> None:
    models, now = ModelBreakers(), 0.0
    models.note_catalog(LIST)
    for step, number, later in steps:
        now += later
        model = f"m{number}:latest"
        match step:
            case "start":
                models.record_start(model, now)
            case "ok":
                models.record_success(model, now)
                assert models.find_fault(model) is None
            case "cancel":
                models.cancel_trial(model)
            case "forgive":
                models.forgive_failure(model, now)
            case "list":
                models.note_catalog((*LIST, ModelInfo(f"x{number}")))
            case _:
                models.record_failure(model, Blame(step), "", now)
        assert len(models.open_faults) <= MAX_MODEL_FAULTS
        assert models.broken(now) <= {fault.model for fault in models.open_faults}
        assert all((models.pause_left(name, now) is not None) for name in models.broken(now))
    for fault in models.open_faults:
        models.cancel_trial(fault.model)
    assert not models.broken(now + MISSING_PACE.max_open_s)
