"""The facts of one node as labelled texts, section by section, for `gpumesh describe`. Pure; no rich.

Texts may come from hosts: the view that draws them makes them safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from gpumesh.cli.views.figures import (
    format_duration,
    format_gib,
    format_milliseconds,
    format_time_left,
    short_gpu,
)
from gpumesh.cli.views.status.token_rate import rate_now
from gpumesh.state import BackendPhase, GpuState, NodeState, TunnelPhase, TunnelState

MAX_SHOWN_MODELS = 100  # of one node, in memory and on disk

Fact = tuple[str, str]
"""A label, then a text."""


@dataclass(frozen=True, slots=True)
class FactSection:
    """A section of the description: its title and its facts."""

    title: str
    facts: Sequence[Fact]


def list_sections(node: NodeState, at: datetime) -> list[FactSection]:
    """All sections that have a fact. ``at`` is the time of the state."""
    sections = [
        FactSection("Tunnel", list(_tunnel_facts(node.tunnel, at))),
        FactSection("Host", list(_host_facts(node))),
        FactSection("GPUs", list(_gpu_facts(node))),
        FactSection("Server", list(_server_facts(node))),
        FactSection("Models", list(_model_facts(node, at))),
        FactSection("Load", list(_load_facts(node))),
    ]
    return [section for section in sections if section.facts]


def _tunnel_facts(tunnel: TunnelState, at: datetime) -> Iterator[Fact]:
    """What is known of the tunnel."""
    yield "transport", tunnel.transport
    state = str(tunnel.state)
    if tunnel.since is not None:
        state += f" for {format_duration((at - tunnel.since).total_seconds())}"
    if tunnel.reconnects:
        state += f", opened again {_times(tunnel.reconnects)}"
    yield "state", state
    if tunnel.last_error is not None:
        code = "" if tunnel.error_code is None else f" ({tunnel.error_code})"
        yield "last error", tunnel.last_error + code
    if tunnel.retry_in_s is not None and tunnel.state is not TunnelPhase.UP:
        yield "next attempt", f"in {format_duration(tunnel.retry_in_s)}"
    if tunnel.rtt_ms is not None:
        yield "round trip", format_milliseconds(tunnel.rtt_ms)
    if tunnel.local_port is not None:
        yield "local end", f"127.0.0.1:{tunnel.local_port}"
    elif tunnel.local_socket is not None:
        yield "local end", f"unix:{tunnel.local_socket}"
    for fingerprint in tunnel.host_keys:
        yield "host key", fingerprint


def _host_facts(node: NodeState) -> Iterator[Fact]:
    """What is known of the host."""
    host = node.host
    if host.hostname is not None:
        yield "hostname", host.hostname
    if host.driver is not None:
        yield "driver", host.driver
    if host.store_free_mib is not None:
        yield "disk", f"{format_gib(host.store_free_mib)} GiB free for models"
    if node.pool_members:
        yield "pool of", ", ".join(node.pool_members)
    if node.labels:
        yield "labels", ", ".join(f"{key}={value}" for key, value in node.labels)


def _gpu_facts(node: NodeState) -> Iterator[Fact]:
    """What is known of each GPU, and of the processes on it."""
    if node.gpus is None:
        yield "", "not known"
    elif not node.gpus:
        yield "", "none"
    for gpu in node.gpus or ():
        yield str(gpu.index), _describe_gpu(gpu)
        yield "", gpu.uuid
        for process in sorted(gpu.processes, key=lambda process: -(process.used_memory_mib or 0)):
            memory = "" if process.used_memory_mib is None else f", {process.used_memory_mib} MiB"
            yield "", f"pid {process.pid}{memory}: {process.name}"


def _describe_gpu(gpu: GpuState) -> str:
    """The name and the known figures of a GPU in one line."""
    parts = [short_gpu(gpu.name)]
    if gpu.memory_total_mib is not None:
        parts.append(f"{format_gib(gpu.memory_used_mib)} of {format_gib(gpu.memory_total_mib)} GiB used")
    if gpu.utilization_pct is not None:
        parts.append(f"{gpu.utilization_pct} % busy")
    if gpu.temperature_c is not None:
        parts.append(f"{gpu.temperature_c} °C")
    if gpu.power_w is not None:
        limit = "" if gpu.power_limit_w is None else f" of {gpu.power_limit_w:.0f}"
        parts.append(f"{gpu.power_w:.0f}{limit} W")
    if gpu.pstate is not None:
        parts.append(gpu.pstate)
    if gpu.throttle not in (None, "idle"):
        parts.append(f"slowed: {gpu.throttle}")
    return ", ".join(parts)


def _server_facts(node: NodeState) -> Iterator[Fact]:
    """What is known of the inference server, and of the routes to it."""
    server = node.backend
    yield "kind", f"{server.kind} {server.version or ''}".rstrip()
    yield "state", str(server.state)
    if server.url is not None:
        yield "address", server.url
    if server.last_error is not None:
        code = "" if server.error_code is None else f" ({server.error_code})"
        yield "last error", server.last_error + code
    if server.latency_ms is not None:
        yield "answers in", format_milliseconds(server.latency_ms)
    rate = rate_now(node)
    if rate is not None:
        yield "tokens/s", f"{rate:.1f}"
    if server.running is not None:
        waiting = "" if server.waiting is None else f", {server.waiting} waiting"
        yield "its own count", f"{server.running} running{waiting} (of all its clients)"
    if server.kv_cache_pct is not None:
        yield "KV cache", f"{server.kv_cache_pct} % in use"
    for route in node.routes:
        state = "" if route.state is BackendPhase.UNKNOWN else f": {route.state}"
        error = "" if route.error is None else f", {route.error}"
        yield "route", f"{route.target} by {route.via}{state}{error}"


def _model_facts(node: NodeState, at: datetime) -> Iterator[Fact]:
    """What is in memory, then what is on disk, then what failed."""
    server = node.backend
    if server.state is not BackendPhase.UP:
        return
    for model in server.loaded[:MAX_SHOWN_MODELS]:
        parts = [] if model.size_vram_mib is None else [f"{format_gib(model.size_vram_mib)} GiB of GPU memory"]
        if model.context_length is not None:
            parts.append(f"context {model.context_length}")
        time_left = format_time_left(model.expires_at, at)
        if time_left is not None:
            parts.append("stays" if time_left == "∞" else f"for {time_left} more")
        yield "in memory", ", ".join([model.name, *parts])
    details = {model.name: model for model in server.catalog}
    for name in server.models[:MAX_SHOWN_MODELS]:
        info = details.get(name)
        known = [] if info is None else [info.parameter_size, info.quantization]
        if info is not None and info.size_mib is not None:
            known.append(f"{format_gib(info.size_mib)} GiB")
        yield "on disk", ", ".join([name, *filter(None, known)])
    hidden_count = len(server.models) - MAX_SHOWN_MODELS
    if hidden_count > 0:
        yield "on disk", f"and {hidden_count} more"
    for broken in node.broken_models:
        retry = "" if broken.retry_in_s is None else f", tried again in {format_duration(broken.retry_in_s)}"
        yield "left out", f"{broken.name}: {broken.error or broken.why}{retry}"


def _load_facts(node: NodeState) -> Iterator[Fact]:
    """The requests of the node, now and since the start."""
    load = node.load
    limit = "" if load.limit is None else f" (it runs {load.limit} at once)"
    yield "now", f"{load.in_flight} in flight{limit}, {load.queued} queued"
    yield "so far", f"{load.served} served, {load.failed} failed, {load.cancelled} cancelled"
    if node.slowness is not None:
        yield "slowness", f"{node.slowness.factor:.1f} times as slow as usual"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
