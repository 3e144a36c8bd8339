"""The metrics of the mesh's state for Prometheus: nodes, tunnels, GPUs, queue, and this process.

Only ``process_families`` is not pure.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gpumesh import __version__
from gpumesh.balancer.outcomes import Outcome
from gpumesh.gateway.observe.exposition import Family, Labels, counter, gauge
from gpumesh.gateway.observe.metrics import OTHER_LABEL
from gpumesh.state import BackendPhase, Finding, GpuState, Health, LoadedModel, MeshState, NodeState, TunnelPhase

MIB = float(1 << 20)  # bytes
MAX_LOADED_MODELS = 32  # of one node
NO_LABELS: Labels = ()


def mesh_families(state: MeshState, attempts: Mapping[str, Mapping[Outcome, int]]) -> Iterator[Family]:
    """The metrics of the mesh as a whole and of its nodes. ``attempts``: for each node, the number of attempts by
    outcome."""
    version_labels: Labels = (("version", __version__),)
    yield gauge("gpumesh_build_info", "The version, as a label.", [(version_labels, 1.0)])
    yield gauge("gpumesh_requests_in_flight", "Requests that a node works on.", [(NO_LABELS, state.gateway.in_flight)])
    yield gauge(
        "gpumesh_queue_length", "Requests that wait for a place on a node.", [(NO_LABELS, state.gateway.queued)]
    )
    yield gauge(
        "gpumesh_gateways",
        "Gateways that share the nodes, this one included, with `redis` in mesh.yaml; 1 while Redis is away.",
        [(NO_LABELS, float(len(state.gateways)))] if state.gateways else [],
    )
    yield from _node_families(state.nodes)
    yield from _tunnel_families(state.nodes)
    yield from _backend_families(state.nodes)
    yield counter(
        "gpumesh_attempts_total",
        "Tries on a node by how they ended; a request that moved on has several.",
        (
            (_attempt_labels(node, outcome), float(count))
            for node, counts in attempts.items()
            for outcome, count in counts.items()
        ),
    )
    yield from _gpu_families(state.nodes)
    yield gauge(
        "gpumesh_finding",
        "1 for each thing that is not as it should be; `gpumesh explain CODE` says more.",
        ((_finding_labels(finding), 1.0) for finding in state.findings),
    )


def server_families(connections: int, refused: int, evicted: int) -> Iterator[Family]:
    """The metrics of clients' connections: how many are open now, and how many were refused and evicted since the
    start."""
    yield gauge("gpumesh_client_connections", "Connections that clients have open.", [(NO_LABELS, connections)])
    yield counter(
        "gpumesh_client_connections_refused_total",
        "Connections past what the process can hold.",
        [(NO_LABELS, float(refused))],
    )
    yield counter(
        "gpumesh_client_connections_closed_for_others_total",
        "Idle connections that were closed because others were needed.",
        [(NO_LABELS, float(evicted))],
    )


def _node_families(nodes: Sequence[NodeState]) -> Iterator[Family]:
    """The metrics of each node's health and load."""
    labels = [_node_labels(node) for node in nodes]

    def gauge_by_node(name: str, text: str, values: Iterable[float | None]) -> Family:
        """A gauge with a sample for each node. ``values`` are in the order of ``nodes``."""
        return gauge(name, text, zip(labels, values, strict=True))

    yield gauge_by_node("gpumesh_node_up", "1 if the node serves.", [float(node.health.is_serving) for node in nodes])
    yield gauge_by_node(
        "gpumesh_node_draining",
        "1 if the node is given no new work.",
        [float(node.health is Health.DRAINING) for node in nodes],
    )
    yield gauge_by_node(
        "gpumesh_node_requests_in_flight",
        "Requests that this node works on.",
        [node.load.in_flight for node in nodes],
    )
    yield gauge_by_node(
        "gpumesh_node_parallel_limit",
        "How many requests the node truly runs at once, as far as known.",
        [node.load.limit for node in nodes],
    )


def _tunnel_families(nodes: Sequence[NodeState]) -> Iterator[Family]:
    """The metrics of each node's tunnel."""
    yield gauge(
        "gpumesh_tunnel_up",
        "1 if the way to the node is open.",
        ((_tunnel_labels(node), float(node.tunnel.state is TunnelPhase.UP)) for node in nodes),
    )
    yield gauge(
        "gpumesh_tunnel_round_trip_seconds",
        "Round trip through the tunnel.",
        ((_node_labels(node), _scale(node.tunnel.rtt_ms, 1e-3)) for node in nodes),  # ms to s
    )
    yield counter(
        "gpumesh_tunnel_reconnects_total",
        "How often the tunnel was lost and opened again.",
        ((_node_labels(node), float(node.tunnel.reconnects)) for node in nodes),
    )


def _backend_families(nodes: Sequence[NodeState]) -> Iterator[Family]:
    """The metrics of each node's inference server and its loaded models."""
    yield gauge(
        "gpumesh_backend_up",
        "1 if the inference server answers.",
        ((_backend_labels(node), float(node.backend.state is BackendPhase.UP)) for node in nodes),
    )
    yield gauge(
        "gpumesh_model_loaded_bytes",
        "GPU memory of each model that is loaded.",
        (
            (_model_labels(node, model), _scale(size_mib, MIB))
            for node in nodes
            for model, size_mib in _loaded_memory(node.backend.loaded)
        ),
    )


def _loaded_memory(loaded: Sequence[LoadedModel]) -> Iterator[tuple[str, float | None]]:
    """Yields the name and memory (MiB) of the ``MAX_LOADED_MODELS`` largest models, then one entry for all others, with
    the sum of the known figures. The number is bounded because Prometheus keeps a series for each name, for months."""
    largest_first = sorted(loaded, key=lambda model: -(model.size_vram_mib or 0))
    for model in largest_first[:MAX_LOADED_MODELS]:
        yield model.name, model.size_vram_mib
    other_sizes = [model.size_vram_mib for model in largest_first[MAX_LOADED_MODELS:]]
    known_sizes = [size for size in other_sizes if size is not None]
    if known_sizes:
        yield OTHER_LABEL, sum(known_sizes)


def _gpu_families(nodes: Iterable[NodeState]) -> Iterator[Family]:
    """The metrics of GPUs. A GPU that two nodes share appears under both nodes. So a sum over these metrics should
    count each ``uuid`` once."""
    nodes_and_gpus = [(node, gpu) for node in nodes for gpu in node.gpus or ()]
    labels = [_gpu_labels(node, gpu) for node, gpu in nodes_and_gpus]

    def gauge_by_gpu(name: str, text: str, values: Iterable[float | None]) -> Family:
        """A gauge with a sample for each GPU. ``values`` are in the order of ``gpus``."""
        return gauge(name, text, zip(labels, values, strict=True))

    gpus = [gpu for _, gpu in nodes_and_gpus]
    yield gauge_by_gpu(
        "gpumesh_gpu_memory_total_bytes", "GPU memory.", [_scale(gpu.memory_total_mib, MIB) for gpu in gpus]
    )
    yield gauge_by_gpu(
        "gpumesh_gpu_memory_used_bytes", "GPU memory in use.", [_scale(gpu.memory_used_mib, MIB) for gpu in gpus]
    )
    yield gauge_by_gpu(
        "gpumesh_gpu_utilization_ratio",
        "Share of time in which any kernel ran.",
        [_scale(gpu.utilization_pct, 0.01) for gpu in gpus],  # percent to a share of 1
    )
    yield gauge_by_gpu("gpumesh_gpu_temperature_celsius", "GPU temperature.", [gpu.temperature_c for gpu in gpus])
    yield gauge_by_gpu("gpumesh_gpu_power_watts", "Power draw.", [gpu.power_w for gpu in gpus])
    yield gauge_by_gpu("gpumesh_gpu_power_limit_watts", "Power limit.", [gpu.power_limit_w for gpu in gpus])


def process_families() -> Iterator[Family]:
    """Metrics of this process, with the names that Prometheus's own clients use. Memory and open files are known on
    Linux only."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = usage.ru_utime + usage.ru_stime
    yield counter("process_cpu_seconds_total", "CPU time of the gateway's process.", [(NO_LABELS, cpu_s)])
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield gauge("process_max_fds", "How many files it may have open.", [(NO_LABELS, float(soft_limit))])
    process_folder = Path("/proc/self")
    try:
        _, resident_pages, *_ = (process_folder / "statm").read_text().split()
        resident_bytes = int(resident_pages) * os.sysconf("SC_PAGE_SIZE")
        open_files = len(os.listdir(process_folder / "fd"))
    except (OSError, ValueError):  # there is no /proc: not Linux
        return
    yield gauge("process_resident_memory_bytes", "Memory.", [(NO_LABELS, float(resident_bytes))])
    yield gauge("process_open_fds", "Files that it has open.", [(NO_LABELS, float(open_files))])


# -- labels ----------------------------------------------------------------------------------------------------------


def _attempt_labels(node: str, outcome: Outcome) -> Labels:
    return (("node", node), ("outcome", outcome.value))


def _finding_labels(finding: Finding) -> Labels:
    return (("node", finding.node or ""), ("code", finding.code), ("severity", finding.severity.value))


def _node_labels(node: NodeState) -> Labels:
    return (("node", node.name),)


def _tunnel_labels(node: NodeState) -> Labels:
    return (("node", node.name), ("transport", node.tunnel.transport))


def _backend_labels(node: NodeState) -> Labels:
    return (("node", node.name), ("kind", node.backend.kind))


def _model_labels(node: NodeState, model: str) -> Labels:
    return (("node", node.name), ("model", model))


def _gpu_labels(node: NodeState, gpu: GpuState) -> Labels:
    return (("node", node.name), ("gpu", str(gpu.index)), ("uuid", gpu.uuid), ("name", gpu.name))


def _scale(value: float | None, factor: float) -> float | None:
    """The value in another unit: multiplied by ``factor``. It is rounded because a float cannot hold the factors 0.01
    and 0.001 exactly. ``None`` for an unknown value."""
    return None if value is None else round(value * factor, 9)
