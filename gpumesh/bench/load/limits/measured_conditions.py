"""Makes the conditions of a stage from its samples and the measurement of the processes, and judges them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from gpumesh.bench.load.conditions import LoadConditions, Via
from gpumesh.bench.load.limits.burst_wait import median_wait_ms, time_per_piece_s
from gpumesh.bench.load.limits.client_judge import LATE_CLIENT_MS, client_load, judge_load
from gpumesh.bench.load.limits.load_meter import LoadMeter
from gpumesh.bench.load.samples import ClientLoad, LoadSample


def measured_conditions(
    samples: Sequence[LoadSample],
    meter: LoadMeter,
    *,
    via: Via,
    own_process: bool,
    mesh_is_here: bool = False,
    parsed_early: int = 0,
) -> tuple[ClientLoad, LoadConditions]:
    """The load generator's own figures, and the conditions with what limited the figures.

    ``samples`` are those of the stage, with times since its start. ``mesh_is_here``: the requests went through a mesh
    in the process that was measured. The rest: as in ``LoadConditions``.
    """
    windows = [
        (meter.started_s + sample.sent_s, meter.started_s + sample.arrivals_s[0])
        for sample in samples
        if sample.arrivals_s
    ]
    arrivals_s = sorted(meter.started_s + arrival_s for sample in samples for arrival_s in sample.arrivals_s)
    pieces = len(arrivals_s)
    mesh_cpu_s = meter.own_cpu_s if mesh_is_here else meter.mesh_cpu_s()
    run_time_s = meter.own_run_time_s if mesh_is_here else meter.mesh_run_time_s
    burst_wait_ms = None
    if mesh_cpu_s is not None and run_time_s is not None and via in (Via.GATEWAY, Via.MESH):
        piece_s = time_per_piece_s(mesh_cpu_s, len(samples), pieces)
        burst_wait_ms = median_wait_ms(windows, arrivals_s, run_time_s, piece_s)
    conditions = LoadConditions(
        via=via,
        own_process=own_process,
        generator=meter.generator_load(windows),
        mesh=meter.mesh_load(windows),
        tunnel_cpu=meter.tunnel_cpu(),
        machine=meter.machine_load(),
        us_per_piece=meter.own_cpu_s * 1e6 / pieces if pieces else None,
        parsed_early=parsed_early,
        burst_wait_ms=burst_wait_ms,
    )
    ttfts_ms = [sample.ttft_ms for sample in samples if sample.ttft_ms is not None]
    late_sends = sum((sample.sent_s - sample.intended_s) * 1000.0 > LATE_CLIENT_MS for sample in samples)
    conditions = judge_load(
        conditions,
        meter.lags_ms,
        late_sends=late_sends,
        sends=len(samples),
        ttft_ms=median(ttfts_ms) if ttfts_ms else None,
    )
    return client_load(conditions, meter.lags_ms, late_sends), conditions
