from dataclasses import replace
from datetime import UTC, datetime, timedelta

from gpumesh.mesh.history import MAX_GPUS, MAX_OLD_SERIES, STEP_S, STEPS, History, Recorder
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
from gpumesh.wire import from_json, to_json

START = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


def state(after_s: float, busy: int | None, rate: float | None = 10.0, in_flight: int = 0) -> MeshState:
    gpu = GpuState(0, "GPU-1", "4090", memory_used_mib=1000, utilization_pct=busy)
    backend = BackendState("ollama", tokens_per_s=rate)
    node = NodeState("one", Health.HEALTHY, None, TunnelState("direct"), backend, gpus=(gpu,))
    gateway = GatewayState(in_flight=in_flight)
    return MeshState("m", START + timedelta(seconds=after_s), gateway, compute_totals((node,)), (node,))


def test_a_step_is_the_mean_of_its_values() -> None:
    recorder = Recorder()
    for after_s, busy in ((0.0, 10), (1.0, 20), (STEP_S, 90)):
        recorder.add(state(after_s, busy, in_flight=2))
    history = recorder.history()
    assert history.gpu_utilization("GPU-1")[-2:] == (15.0, 90.0)
    assert len(history.gpu_utilization("GPU-1")) == STEPS
    assert {series.key: series.values[-1] for series in history.mesh} == {"in_flight": 2.0, "queued": 0.0}
    assert history.memory[0].values[-1] == 1000.0


def test_unknown_values_and_steps_without_a_state_are_none() -> None:
    recorder = Recorder()
    recorder.add(state(0.0, None, rate=None))
    recorder.add(state(3 * STEP_S, 50))
    assert recorder.history().gpu_utilization("GPU-1")[-4:] == (None, None, None, 50.0)
    assert recorder.history().nodes[0].values[-4:] == (None, None, None, 10.0)


def test_only_the_last_steps_are_kept() -> None:
    recorder = Recorder(steps=3)
    for step in range(10):
        recorder.add(state(step * STEP_S, step))
    assert recorder.history().gpu_utilization("GPU-1") == (7.0, 8.0, 9.0)


def test_a_recorder_continues_a_history_that_crossed_the_socket() -> None:
    first = Recorder()
    for step in range(4):
        first.add(state(step * STEP_S, 10 * step))
    sent = from_json(History, to_json(first.history()))
    second = Recorder(sent, at=state(3 * STEP_S, 0).at)
    second.add(state(4 * STEP_S, 70))
    assert second.history().gpu_utilization("GPU-1")[-5:] == (0.0, 10.0, 20.0, 30.0, 70.0)
    other = Recorder(replace(sent, step_s=1.0), at=START)
    assert other.history() == History(), "steps of another length do not fit"


def test_no_state_gives_an_empty_history() -> None:
    assert Recorder().history() == History()
    assert History().gpu_utilization("GPU-1") == ()


def test_a_host_that_shows_other_gpus_each_time_fills_no_memory_and_hides_no_other() -> None:
    recorder = Recorder(step_s=15.0, steps=240)
    honest = state(0.0, 50).nodes[0]
    for look in range(240 * 6):
        others = tuple(GpuState(n, f"GPU-{look}-{n}", "4090", utilization_pct=1) for n in range(64))
        hostile = replace(honest, name="hostile", gpus=others)
        at = START + timedelta(seconds=2.5 * look)
        recorder.add(replace(state(0.0, 50), at=at, nodes=(hostile, honest)))
    history = recorder.history()
    assert history.gpu_utilization("GPU-1") == (50.0,) * 240
    assert len(history.gpus) <= MAX_OLD_SERIES + 2 * MAX_GPUS + 2


def test_a_series_that_left_long_ago_is_not_pushed_out_by_the_length_of_others() -> None:
    recorder = Recorder(steps=3 * MAX_OLD_SERIES)
    recorder.add(replace(state(0.0, 50), nodes=(replace(state(0.0, 50).nodes[0], name="left first"),)))
    for step in range(1, MAX_OLD_SERIES + 10):
        recorder.add(replace(state(step * STEP_S, 50), nodes=(replace(state(0.0, 50).nodes[0], name="left later"),)))
    for step in range(MAX_OLD_SERIES + 10, MAX_OLD_SERIES + 12):
        recorder.add(state(step * STEP_S, 50))
    assert [series.key for series in recorder.history().nodes] == ["left first", "left later", "one"]
