"""Judges whether the figures of a stage are those of the servers: CLIENT-BOUND, MESH-BOUND or MACHINE-BUSY. Pure.

A process whose main thread runs nearly all the time is what limits. A thread that could run and has no core says the
same of the machine. Both are looked at twice: for the whole stage, and for the time in which requests waited for their
first token. The second is short in a stage of long answers, and TTFT is measured in it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpumesh.bench.load.conditions import Limit, LoadConditions
from gpumesh.bench.load.samples import ClientLoad
from gpumesh.bench.stats import percentile

# Above these values the figures describe this machine rather than the servers.
BUSY_CPU = 0.85  # of one core: a single thread with less than 15 % idle time delays what comes in bursts
BUSY_MACHINE = 0.95  # of all cores
# The share of the time in which a thread could run and had no core. On a busy machine a little is enough: programs that
# give way to ours (nice) make a machine busy, and no figure wrong; but others may have taken the cores of the servers.
WAITING_SHARE, WAITING_SHARE_WHEN_BUSY = 0.1, 0.02
LATE_CLIENT_MS = 5.0  # of the event loop, or of a request that should have been sent
MAX_LATE_SHARE = 0.01  # of an open loop's requests: a smaller share does not move a median
MAX_TTFT_SHARE = 0.05  # of TTFT that may belong to no server


def client_load(conditions: LoadConditions, lags_ms: Sequence[float], late_sends: int) -> ClientLoad:
    """The load generator's own figures. ``lags_ms``: of its event loop. ``late_sends``: how many requests of an open
    loop were sent more than ``LATE_CLIENT_MS`` after their intended moment."""
    return ClientLoad(conditions.generator.cpu, _percentile(lags_ms, 0.99), late_sends, conditions.reason)


def judge_load(
    conditions: LoadConditions,
    lags_ms: Sequence[float],
    *,
    late_sends: int,
    sends: int,
    ttft_ms: float | None = None,
) -> LoadConditions:
    """The same conditions with the lag, and with what limited the figures, if anything did. ``sends``: the number of
    requests. ``ttft_ms``: the median of the stage. The rest: as in ``client_load``."""
    # The 90th percentile: a single pause of the machine is no reason to doubt all figures.
    judged = replace(conditions, lag_p90_ms=_percentile(lags_ms, 0.9))
    limit, reason = _find_busy_process(judged) or (None, None)
    if limit is None:
        limit, reason = _find_busy_machine(judged) or (None, None)
    if limit is None:
        limit, reason = _find_late_first_tokens(judged, ttft_ms) or (None, None)
    if limit is None and sends and late_sends / sends > MAX_LATE_SHARE:
        limit = Limit.CLIENT_BOUND
        reason = f"{late_sends} of {sends} requests went out late: the load generator could not keep up"
    return replace(judged, limit=limit, reason=reason)


def _percentile(values: Sequence[float], share: float) -> float:
    return percentile(sorted(values), share) if values else 0.0


def _generator_name(conditions: LoadConditions) -> str:
    return "the load generator" if conditions.own_process else "this process, which also sends the requests,"


def _find_busy_process(conditions: LoadConditions) -> tuple[Limit, str] | None:
    """A process that used nearly a whole core in the stage."""
    mesh_cpu = None if conditions.mesh is None else conditions.mesh.cpu
    for name, cpu, limit in (
        (_generator_name(conditions), conditions.generator.cpu, Limit.CLIENT_BOUND),
        ("the mesh's process", mesh_cpu, Limit.MESH_BOUND),
        ("the process of a tunnel", conditions.tunnel_cpu, Limit.MESH_BOUND),
    ):
        if cpu is not None and cpu >= BUSY_CPU:
            return limit, f"{name} used {cpu:.0%} of a core: it may be what limits"
    return None


def _find_busy_machine(conditions: LoadConditions) -> tuple[Limit, str] | None:
    """Too few cores: a thread of ours that waited for one, or an event loop that often came late."""
    name, machine = _generator_name(conditions), conditions.machine
    processes = [(name, conditions.generator)]
    if conditions.mesh is not None:
        processes.append(("the mesh's process", conditions.mesh))
    known_waits = [(load.waiting, process) for process, load in processes if load.waiting is not None]
    longest_wait, waiting_process = max(known_waits, default=(None, name))
    is_busy = machine is not None and machine.busy >= BUSY_MACHINE
    if machine is not None and is_busy and (longest_wait is None or longest_wait >= WAITING_SHARE_WHEN_BUSY):
        return Limit.MACHINE_BUSY, (
            f"this machine's {machine.cores} cores were {machine.busy:.0%} busy, {machine.other_cpu:.1f} of them with"
            " other programs"
        )
    if longest_wait is not None and longest_wait >= WAITING_SHARE:
        return Limit.MACHINE_BUSY, f"{waiting_process} waited for a core in {longest_wait:.0%} of the time"
    if conditions.lag_p90_ms >= LATE_CLIENT_MS:
        lag = f"{name} often ran {conditions.lag_p90_ms:.0f} ms late"
        return Limit.MACHINE_BUSY, f"{lag}: something else uses this machine's cores"
    return None


def _find_late_first_tokens(conditions: LoadConditions, ttft_ms: float | None) -> tuple[Limit, str] | None:
    """Whether TTFT is partly the time of a process of ours: it ran, or waited for a core, before the first tokens."""
    for name, load, limit in (
        (_generator_name(conditions), conditions.generator, Limit.CLIENT_BOUND),
        ("the mesh's process", conditions.mesh, Limit.MESH_BOUND),
    ):
        cpu, waiting = (None, None) if load is None else (load.first_token_cpu, load.first_token_waiting)
        if waiting is not None and waiting >= MAX_TTFT_SHARE:
            return Limit.MACHINE_BUSY, f"before first tokens, {name} waited for a core in {waiting:.0%} of the time"
        if cpu is not None and cpu >= BUSY_CPU:
            return limit, f"before first tokens, {name} used {cpu:.0%} of a core: TTFT is partly its own time"
    wait_ms = conditions.burst_wait_ms
    if wait_ms is not None and ttft_ms and wait_ms / ttft_ms >= MAX_TTFT_SHARE:
        return Limit.MESH_BOUND, (
            f"requests were sent together, and waited {wait_ms:.1f} ms for the mesh's process, about"
            f" {wait_ms / ttft_ms:.0%} of TTFT"
        )
    return None
