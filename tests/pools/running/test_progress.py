"""What a start of a pool reports: how far it has loaded, and how fast the pool answers."""

from __future__ import annotations

from dataclasses import replace

from gpumesh.pool_spec import KvType
from gpumesh.pools.base import DeviceOffer, DeviceShare, MemberPlan, ModelShape, PoolPhase, PoolPlan, PoolState
from gpumesh.pools.running.progress import MeasuredSpeed, PoolProgress
from gpumesh.pools.running.speed_watch import STALLED_S, ServerCounters, StallWatch, parse_counters

SHAPE = ModelShape("llama", "tiny", "F16", (100, 100), 50, 50, (64, 64), 32, 256, 4, 2048, 1000, 320)
CPU = DeviceOffer("CPU", None, 1000, 900)
MEMBERS = (
    MemberPlan("a", is_head=True, shares=(DeviceShare(CPU, 0, 2, 200, 20, 10, 900),)),
    MemberPlan("b", is_head=False, shares=(DeviceShare(CPU, 2, 1, 50, 0, 5, 900),)),
)
PLAN = PoolPlan("big", "m", SHAPE, MEMBERS, 2048, 1, KvType.F16)
LOADING = PoolState("big", "m", PoolPhase.LOADING)


def test_the_rate_of_a_load_is_that_of_its_last_seconds() -> None:
    now = [0.0]
    progress = PoolProgress(lambda: now[0], lambda: None)
    assert progress.fill(LOADING) == LOADING
    for second in range(10):
        now[0] = float(second)
        progress.set_loaded(100 * second if second < 5 else 400 + 10 * (second - 4), 500)
    state = progress.fill(LOADING)
    assert (state.loaded_bytes, state.load_bytes) == (450, 500)
    assert state.load_bytes_per_s == 10.0
    assert state.left_s == 5.0
    progress.set_loaded(10_000, 500)
    assert progress.fill(LOADING).loaded_bytes == 500


def test_members_show_what_was_planned_measured_and_what_is_wrong() -> None:
    changes: list[None] = []
    progress = PoolProgress(lambda: 0.0, lambda: changes.append(None))
    progress.set_plan(replace(PLAN, load_s=8.0))
    assert progress.fill(LOADING).left_s == 8.0, "until more is known"
    progress.set_loaded(10, 300)
    progress.set_measured({"a": 231, "b": 56})
    progress.set_problem("b", "it was lost")
    progress.set_speed(MeasuredSpeed(12.5, 0.7))
    progress.set_speed(MeasuredSpeed(12.5, 0.7))
    state = progress.fill(LOADING)
    assert [(m.node, m.layers, m.planned_bytes, m.measured_bytes) for m in state.members] == [
        ("a", 2, 230, 231),
        ("b", 1, 55, 56),
    ]
    assert state.members[1].problem == "it was lost"
    assert (state.tokens_per_s, state.draft_acceptance, state.loaded_bytes) == (12.5, 0.7, None)
    assert len(changes) == 5, "an equal speed is no change"
    progress.clear()
    assert progress.fill(LOADING) == LOADING


def test_the_speed_comes_from_the_counters_of_llama_server() -> None:
    page = b"# TYPE x counter\nllamacpp:tokens_predicted_total 120\nllamacpp:tokens_predicted_seconds_total 4.0\n"
    assert parse_counters(page + b"llamacpp:n_decode_total 7\n") == ServerCounters(30.0, 7.0)
    drafts = b"llamacpp:spec_decode_num_draft_tokens_total 40\nllamacpp:spec_decode_num_accepted_tokens_total 30\n"
    assert parse_counters(drafts).acceptance == 0.75
    assert parse_counters(drafts.replace(b"40", b"0")).acceptance is None
    assert parse_counters(page.replace(b"4.0", b"0")) == ServerCounters()
    assert parse_counters(b"") == ServerCounters()


def test_a_server_with_requests_that_computes_nothing_has_stalled() -> None:
    watch = StallWatch()
    assert not watch.is_stalled(10.0, is_busy=True, now=0.0)
    assert not watch.is_stalled(10.0, is_busy=True, now=1.0)
    assert not watch.is_stalled(None, is_busy=True, now=STALLED_S)
    assert watch.is_stalled(None, is_busy=True, now=STALLED_S + 1.0)
    assert not watch.is_stalled(11.0, is_busy=True, now=STALLED_S + 2.0), "it has computed a step"
    assert not watch.is_stalled(11.0, is_busy=False, now=9 * STALLED_S), "nobody waits for it"
    assert not watch.is_stalled(11.0, is_busy=True, now=9 * STALLED_S + 1.0)
