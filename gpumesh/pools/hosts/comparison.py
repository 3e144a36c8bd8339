"""Compares llama-server's report with the plan: a pool with less than was planned is never healthy. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpumesh.pools.base import DeviceShare, PoolPlan
from gpumesh.pools.hosts.buffer_places import BufferPlace
from gpumesh.pools.hosts.commands import WorkerAddress, device_name, endpoints_by_node, used_shares
from gpumesh.pools.hosts.head_log import BufferKind, HeadLog
from gpumesh.pools.hosts.programs import HostPrograms

TOLERANCE = 0.05
# Small models: the sizes in the log are rounded, and each tensor's place is.
SLACK_BYTES = 1 << 20
# Compute buffers depend on the build of llama.cpp, so a plan may be a little wrong about them.
TOTAL_SLACK_BYTES = 16 << 20

Buffers = Mapping[tuple[BufferPlace, BufferKind], int]


def compare_with_plan(
    plan: PoolPlan, log: HeadLog, *, programs: HostPrograms, workers: Sequence[WorkerAddress]
) -> tuple[str, ...]:
    """The problems in words for people; empty if llama-server has loaded the model as it was planned.

    ``programs`` are those of the head's host. A worker's layers must be on that worker, the head's layers on the GPU of
    the plan, and the weights and KV caches must have the planned sizes: otherwise layers are elsewhere, perhaps on a
    CPU, and the pool would be slow for no visible reason.
    """
    buffers = log.buffers()
    problems: list[str] = []
    endpoints = endpoints_by_node(workers)
    for member in plan.workers:
        endpoint = endpoints[member.node]
        if not any(place.endpoint == endpoint for place, _kind in buffers):
            problems.append(f"llama-server runs without the worker on {member.node}")
            continue
        for number, share in enumerate(used_shares(member)):
            place = BufferPlace("RPC", endpoint, number)
            problems += _compare_device(share, place, buffers, f"{share.device.name} of {member.node}")
    for share in used_shares(plan.head):
        if share.device.index is not None:
            place = BufferPlace(device_name(share, programs))
            problems += _compare_device(share, place, buffers, f"{share.device.name} of {plan.head.node}")
    problems += _find_layers_on_cpu(plan, buffers)
    return tuple(problems)


def _compare_device(share: DeviceShare, place: BufferPlace, buffers: Buffers, device: str) -> list[str]:
    """The problems with one device that gets layers. ``device``: its name in a message."""
    weights = buffers.get((place, BufferKind.MODEL), 0)
    if not weights:
        return [f"{device} got no layers, where {share.layers} were planned"]
    caches = buffers.get((place, BufferKind.KV), 0) + buffers.get((place, BufferKind.STATE), 0)
    compute = buffers.get((place, BufferKind.COMPUTE), 0)
    problems = []
    if _differs(weights, share.weights_bytes, SLACK_BYTES):
        problems.append(f"{device} has {_mib(weights)} of weights, where {_mib(share.weights_bytes)} were planned")
    if _differs(caches, share.kv_bytes, SLACK_BYTES):
        problems.append(f"{device} has {_mib(caches)} of KV cache, where {_mib(share.kv_bytes)} were planned")
    total, planned = weights + caches + compute, share.needed_bytes - share.draft_bytes
    if not problems and _differs(total, planned, TOTAL_SLACK_BYTES):
        problems.append(f"{device} uses {_mib(total)} in all, where {_mib(planned)} were planned")
    return problems


def _find_layers_on_cpu(plan: PoolPlan, buffers: Buffers) -> list[str]:
    """The problem of layers on the head's CPU that were planned for a GPU or a worker: seen by their KV cache, because
    the weights on the CPU may be a mapped file, with more in it than is used."""
    planned = sum(share.kv_bytes for share in used_shares(plan.head) if share.device.index is None)
    found = sum(
        size
        for (place, kind), size in buffers.items()
        if place.endpoint is None and place.name.startswith("CPU") and kind in (BufferKind.KV, BufferKind.STATE)
    )
    if found > planned * (1 + TOLERANCE) + SLACK_BYTES:
        cpu = f"the CPU of {plan.head.node}"
        return [f"layers are on {cpu}: it has {_mib(found)} of KV cache, where {_mib(planned)} were planned"]
    return []


def _differs(found: int, planned: int, slack: int) -> bool:
    return abs(found - planned) > planned * TOLERANCE + slack


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
