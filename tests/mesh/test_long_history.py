"""A day of figures: means over steps, each range in its own steps, and no more memory than is allowed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from gpumesh.mesh.long_history import RESOLUTIONS, HistoryPart, LongHistory
from gpumesh.state import (
    BackendState,
    GatewayState,
    GpuState,
    Health,
    MeshState,
    NodeState,
    TunnelState,
    compute_totals,
)

START = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


def state(after_s: float, busy: int | None, *, uuid: str = "GPU-1") -> MeshState:
    gpu = GpuState(0, uuid, "4090", memory_used_mib=1000, utilization_pct=busy, power_w=float("nan"))
    node = NodeState("one", Health.HEALTHY, None, TunnelState("direct"), BackendState("ollama"), gpus=(gpu,))
    at = START + timedelta(seconds=after_s)
    return MeshState("m", at, GatewayState(in_flight=2), compute_totals((node,)), (node,))


def filled(until_s: int, every_s: int = 5) -> LongHistory:
    history = LongHistory()
    for after_s in range(0, until_s, every_s):
        history.add(state(after_s, after_s % 100), {"ttft_p50_ms": None})
    return history


def read(history: LongHistory, range_s: float, after: int | None = None) -> HistoryPart:
    """The part, at once."""
    steps = history.part(range_s, after)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            part: HistoryPart = stop.value
            return part


def test_steps_are_means_and_start_where_the_data_starts() -> None:
    part = read(filled(20), 300.0)
    assert (part.step_s, part.last - part.first, part.first) == (5, 3, part.began)
    assert part.series["gpus"] == {"GPU-1": (0.0, 5.0, 10.0, 15.0)}
    assert part.series["mesh"] == {"in_flight": (2.0,) * 4, "queued": (0.0,) * 4}
    assert "power" not in part.series, "NaN is not known"


def test_each_range_has_its_own_steps_and_a_day_is_the_longest() -> None:
    history = filled(26 * 3600, every_s=60)
    seen = {range_s: read(history, range_s) for range_s in (300.0, 900.0, 3600.0, 21600.0, 86400.0, 1e9)}
    assert [part.step_s for part in seen.values()] == [5, 5, 15, 60, 300, 300]
    assert [part.last - part.first + 1 for part in seen.values()] == [60, 180, 240, 360, 288, 288]
    hour = seen[21600.0].series["gpus"]["GPU-1"]
    assert hour[-1] == (26 * 3600 - 60) % 100
    assert None in seen[3600.0].series["gpus"]["GPU-1"], "steps of 15 s in which nothing was added"


def test_only_what_is_new_is_told_again() -> None:
    history = filled(60)
    part = read(history, 300.0)
    more = read(history, 300.0, after=part.last - 3)
    assert more.first == part.last - 2
    assert more.series["gpus"]["GPU-1"] == part.series["gpus"]["GPU-1"][-3:]
    assert read(history, 300.0, after=part.last + 9).first == part.last, "a clock that was ahead gets the last step"


def test_a_pause_leaves_a_gap_and_forgets_what_is_too_old() -> None:
    history = filled(60)
    history.add(state(60 + 890, 7), {})
    assert set(read(history, 300.0).series["gpus"]["GPU-1"][:-1]) == {None}
    history.add(state(60 + 5000, 8), {})
    assert read(history, 900.0).series["gpus"]["GPU-1"] == (*(None,) * 179, 8.0)


def test_new_gpus_each_time_take_no_more_memory_than_is_allowed() -> None:
    history = LongHistory(max_series=50)
    for number in range(500):
        history.add(state(5.0 * number, 1, uuid=f"GPU-{number}"), {})
    part = read(history, 86400.0)
    assert sum(len(series) for series in part.series.values()) <= 2 * 50
    assert "GPU-499" in read(history, 300.0).series["gpus"]
    for tier, (_, steps) in zip(history._tiers, RESOLUTIONS, strict=True):
        assert len(tier._rings) <= 50
        assert all(len(ring) == steps for ring in tier._rings.values())


def test_a_large_part_is_read_in_steps_between_which_states_may_come() -> None:
    history = LongHistory()
    for after_s in range(0, 900, 5):
        history.add(state(after_s, 50), {f"more{number}": 1.0 for number in range(300)})
    steps = history.part(900.0)
    next(steps)
    history.add(state(905.0, 99), {})
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        part = stop.value
    assert {len(values) for values in part.series["mesh"].values()} == {180}
    assert part.series["gpus"]["GPU-1"][-1] == 50.0, "the step that has ended meanwhile has its mean"
