"""Judges whether the figures of a stage are those of the servers: CLIENT-BOUND, MESH-BOUND or MACHINE-BUSY. Pure.

A process whose main thread runs nearly all the time is what limits. A thread that could run and has no core says the
same of the machine. Both are looked at twice: for the whole stage, and for the time in which requests waited for their
first token. The second is short in a stage of long answers, and TTFT is measured in it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpumesh.bench.load.conditions import Limit, LoadConditions, MachineLoad, ProcessLoad
from gpumesh.bench.load.samples import ClientLoad
from gpumesh.bench.stats import percentile

# Above these values the figures describe this machine rather than the servers.
BUSY_CPU = 0.85  # of one core: a single thread with less than 15 % idle time delays what comes in bursts
BUSY_MACHINE = 0.95  # of all cores
WAITING_SHARE = 0.1  # of the time, in which a thread could run and had no core
LATE_CLIENT_MS = 5.0  # of the event loop, or of a request that should have been sent
MAX_LATE_SHARE = 0.01  # of an open loop's requests: a smaller share does not move a median


def client_load(conditions: LoadConditions, lags_ms: Sequence[float], late_sends: int) -> ClientLoad:
    """The load generator's own figures. ``lags_ms``: of its event loop. ``late_sends``: how many requests of an open
    loop were sent more than ``LATE_CLIENT_MS`` after their intended moment."""
    return ClientLoad(conditions.generator.cpu, _percentile(lags_ms, 0.99), late_sends, conditions.reason)


def judge_load(conditions: LoadConditions, lags_ms: Sequence[float], late_sends: int, sends: int) -> LoadConditions:
    """The same conditions with the lag, and with what limited the figures, if anything did. ``sends``: the number of
    requests. The rest: as in ``client_load``."""
    # The 90th percentile: a single pause of the machine is no reason to doubt all figures.
    judged = replace(conditions, lag_p90_ms=_percentile(lags_ms, 0.9))
    limit, reason = _find_limit(judged, late_sends, sends)
    return replace(judged, limit=limit, reason=reason)


def _percentile(values: Sequence[float], share: float) -> float:
    return percentile(sorted(values), share) if values else 0.0


def _find_limit(conditions: LoadConditions, late_sends: int, sends: int) -> tuple[Limit | None, str | None]:
    """The first limit that applies, with a sentence for a person. A process that is busy explains a busy machine, and
    a busy machine explains late requests: so they are looked at in this order."""
    generator, mesh, machine = conditions.generator, conditions.mesh, conditions.machine
    name = "the load generator" if conditions.own_process else "this process, which also sends the requests,"
    if generator.cpu >= BUSY_CPU:
        return Limit.CLIENT_BOUND, f"{name} used {generator.cpu:.0%} of a core: it may be what limits"
    if mesh is not None and mesh.cpu >= BUSY_CPU:
        return Limit.MESH_BOUND, f"the mesh's process used {mesh.cpu:.0%} of a core: it may be what limits"
    if conditions.tunnel_cpu is not None and conditions.tunnel_cpu >= BUSY_CPU:
        return Limit.MESH_BOUND, f"a tunnel's process used {conditions.tunnel_cpu:.0%} of a core: it may be what limits"
    if machine is not None and machine.busy >= BUSY_MACHINE:
        return Limit.MACHINE_BUSY, _describe_busy_machine(machine)
    for process, process_name, limit in (
        (generator, name, Limit.CLIENT_BOUND),
        (mesh, "the mesh's process", Limit.MESH_BOUND),
    ):
        if process is not None:
            found = _find_limit_of_first_tokens(process, process_name, limit)
            if found is not None:
                return found
    if conditions.lag_p90_ms >= LATE_CLIENT_MS:
        reason = f"{name} often ran {conditions.lag_p90_ms:.0f} ms late: something else uses this machine's cores"
        return Limit.MACHINE_BUSY, reason
    if sends and late_sends / sends > MAX_LATE_SHARE:
        reason = f"{late_sends} of {sends} requests went out late: the load generator could not keep up"
        return Limit.CLIENT_BOUND, reason
    return None, None


def _find_limit_of_first_tokens(process: ProcessLoad, name: str, limit: Limit) -> tuple[Limit, str] | None:
    """Whether a process delayed the first tokens: it ran, or waited for a core, nearly all the time before them."""
    cpu, waiting = process.first_token_cpu, process.first_token_waiting or 0.0
    if process.waiting is not None and process.waiting >= WAITING_SHARE:
        return Limit.MACHINE_BUSY, f"{name} waited for a core in {process.waiting:.0%} of the time"
    if cpu is None or cpu + waiting < BUSY_CPU:
        return None
    if waiting >= WAITING_SHARE:
        return Limit.MACHINE_BUSY, f"before the first tokens, {name} waited for a core in {waiting:.0%} of the time"
    return limit, f"before the first tokens, {name} used {cpu:.0%} of a core: TTFT is partly its own time"


def _describe_busy_machine(machine: MachineLoad) -> str:
    return (
        f"this machine's {machine.cores} cores were {machine.busy:.0%} busy, {machine.other_cpu:.1f} of them with other"
        " programs"
    )
