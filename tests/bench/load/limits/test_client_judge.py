"""What limited a stage, by how busy its processes and its machine were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpumesh.bench.load.conditions import Limit, LoadConditions, MachineLoad, ProcessLoad, Via
from gpumesh.bench.load.limits.client_judge import client_load, judge_load

QUIET_LAGS = [0.1] * 100
CALM = LoadConditions(
    Via.GATEWAY,
    own_process=True,
    generator=ProcessLoad(0.3, waiting=0.0, first_token_cpu=0.2, first_token_waiting=0.0),
    mesh=ProcessLoad(0.4, waiting=0.0, first_token_cpu=0.3, first_token_waiting=0.0),
    tunnel_cpu=0.2,
    machine=MachineLoad(cores=2, busy=0.5, other_cpu=0.1),
    burst_wait_ms=0.5,
)


def judged(
    conditions: LoadConditions, *, lags_ms: list[float] = QUIET_LAGS, late_sends: int = 0, ttft_ms: float | None = 60.0
) -> LoadConditions:
    return judge_load(conditions, lags_ms, late_sends=late_sends, sends=100, ttft_ms=ttft_ms)


def changed(**changes: Any) -> LoadConditions:
    return replace(CALM, **changes)


def test_a_calm_stage_has_no_limit() -> None:
    assert judged(CALM).limit is None
    assert judged(CALM).reason is None


def test_what_is_not_known_is_no_limit() -> None:
    """As on a system without /proc."""
    assert judged(LoadConditions(Via.URL, own_process=True, generator=ProcessLoad(0.3)), ttft_ms=None).limit is None


@pytest.mark.parametrize(
    ("conditions", "limit", "words"),
    [
        (changed(generator=ProcessLoad(0.9)), Limit.CLIENT_BOUND, "the load generator used 90% of a core"),
        (changed(generator=ProcessLoad(0.9), own_process=False), Limit.CLIENT_BOUND, "this process"),
        (changed(mesh=ProcessLoad(0.9)), Limit.MESH_BOUND, "the mesh's process used 90% of a core"),
        (changed(tunnel_cpu=0.95), Limit.MESH_BOUND, "tunnel used 95% of a core"),
        (
            changed(generator=replace(CALM.generator, first_token_cpu=0.9)),
            Limit.CLIENT_BOUND,
            "before first tokens, the load generator used 90%",
        ),
        (
            changed(mesh=replace(CALM.mesh or ProcessLoad(0.0), first_token_cpu=0.9)),
            Limit.MESH_BOUND,
            "before first tokens, the mesh's process used 90%",
        ),
        (changed(burst_wait_ms=6.0), Limit.MESH_BOUND, "waited 6.0 ms for the mesh's process, about 10% of TTFT"),
        (
            changed(mesh=replace(CALM.mesh or ProcessLoad(0.0), first_token_waiting=0.08)),
            Limit.MACHINE_BUSY,
            "the mesh's process waited for a core in 8% of the time",
        ),
        (changed(generator=replace(CALM.generator, waiting=0.2)), Limit.MACHINE_BUSY, "waited for a core in 20%"),
        (
            changed(
                machine=MachineLoad(cores=2, busy=0.99, other_cpu=1.4), generator=replace(CALM.generator, waiting=0.05)
            ),
            Limit.MACHINE_BUSY,
            "2 cores were 99% busy, 1.4 of them with other programs",
        ),
        (
            changed(machine=MachineLoad(2, 0.99, 1.4), generator=ProcessLoad(0.2), mesh=None),
            Limit.MACHINE_BUSY,
            "99% busy",
        ),
    ],
)
def test_the_reason_names_what_limits(conditions: LoadConditions, limit: Limit, words: str) -> None:
    result = judged(conditions)
    assert result.limit is limit
    assert words in (result.reason or "")


def test_programs_that_give_way_make_no_figure_wrong() -> None:
    """A niced program fills the machine, and no thread of ours ever waits for a core."""
    assert judged(changed(machine=MachineLoad(cores=2, busy=1.0, other_cpu=1.5))).limit is None


def test_a_busy_process_explains_a_busy_machine() -> None:
    both = changed(mesh=ProcessLoad(0.97, waiting=0.03), machine=MachineLoad(cores=2, busy=1.0, other_cpu=0.6))
    assert judged(both).limit is Limit.MESH_BOUND


def test_lag_and_late_sends() -> None:
    late = judged(CALM, lags_ms=[0.1] * 80 + [12.0] * 20)
    assert late.limit is Limit.MACHINE_BUSY
    assert "often ran 12 ms late" in (late.reason or "")
    assert late.lag_p90_ms == 12.0
    assert judged(CALM, lags_ms=[0.1] * 95 + [12.0] * 5).limit is None, "now and then is no limit"
    assert judged(CALM, late_sends=1).limit is None
    unable = judged(CALM, late_sends=2)
    assert unable.limit is Limit.CLIENT_BOUND
    assert "2 of 100 requests went out late" in (unable.reason or "")


def test_the_clients_own_figures() -> None:
    lags_ms = [0.1] * 98 + [3.0] * 2
    client = client_load(judged(changed(generator=ProcessLoad(0.9))), lags_ms, late_sends=4)
    assert (client.cpu, client.lag_p99_ms, client.late_sends) == (0.9, 3.0, 4)
    assert client.bound is not None
