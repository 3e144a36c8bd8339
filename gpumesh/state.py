"""Frozen snapshots of what was observed: the mesh, its nodes, tunnels, GPUs and backends, and findings.

Each field is a key of the JSON document ``gpumesh.status/1`` (docs/status-json.md). Renaming a field changes that
contract. Unknown is ``None``, never 0. Times are UTC ``datetime``; sizes MiB; powers W; temperatures °C; latencies ms.
``gpumesh.wire`` turns snapshots to JSON and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from gpumesh.gateways_state import MeshGatewayState as MeshGatewayState  # noqa: PLC0414
from gpumesh.scheduling_state import DecisionState as DecisionState  # noqa: PLC0414 - a part of the node's state
from gpumesh.scheduling_state import LearnedState as LearnedState  # noqa: PLC0414
from gpumesh.scheduling_state import LoadingState as LoadingState  # noqa: PLC0414
from gpumesh.scheduling_state import ModelLoadsState as ModelLoadsState  # noqa: PLC0414

STATUS_SCHEMA = "gpumesh.status/1"


class Health(StrEnum):
    """The health of a node."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"  # the node serves, but something is wrong
    DOWN = "down"
    DRAINING = "draining"  # the node gets no new requests
    UNKNOWN = "unknown"

    @property
    def is_serving(self) -> bool:
        """Whether a node with this health counts as up: it gets requests."""
        return self in (Health.HEALTHY, Health.DEGRADED)


class TunnelPhase(StrEnum):
    """The phase of a tunnel's life."""

    IDLE = "idle"
    CONNECTING = "connecting"
    UP = "up"
    BACKOFF = "backoff"  # the tunnel waits for its next attempt
    FAILED = "failed"  # a person must act (key refused, host key changed); the tunnel still retries, slowly
    CLOSED = "closed"


class BackendPhase(StrEnum):
    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"


class Severity(StrEnum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be. ``code`` is stable (docs/codes.md); ``hint`` says what to do. ``nodes``
    are the nodes that a finding about several nodes names."""

    code: str
    severity: Severity
    node: str | None
    message: str
    hint: str | None = None
    nodes: tuple[str, ...] = ()


class LocalAccess(StrEnum):
    """The users of this machine who can connect to a tunnel's local end or to the gateway."""

    OWN_USER = "own-user"  # the user who runs the mesh, and root
    ANY_USER = "any-user"
    UNCHECKED = "unchecked"  # any user: the system does not say which user a connection belongs to
    KEY = "key"  # clients that send the API key


@dataclass(frozen=True, slots=True)
class TunnelState:
    """The state of a node's tunnel. ``transport`` is ``sshtunnel``, ``openssh`` or ``direct``.

    ``local_port``, or ``local_socket`` in its place, stays the same over reconnects. ``local_access`` says who can
    connect to the port or socket. A direct node has none of these three. ``host_keys`` are the recorded fingerprints of
    the host that was reached last.
    """

    transport: str
    state: TunnelPhase = TunnelPhase.IDLE
    since: datetime | None = None
    rtt_ms: float | None = None
    reconnects: int = 0
    last_error: str | None = None
    error_code: str | None = None
    hint: str | None = None
    retry_in_s: float | None = None
    local_port: int | None = None
    local_socket: str | None = None
    local_access: LocalAccess | None = None
    host_keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HostState:
    """Facts about a node's host. ``store_free_mib`` is the free space where models are kept; only an inspection reads
    it."""

    hostname: str | None = None
    driver: str | None = None
    store_free_mib: int | None = None


@dataclass(frozen=True, slots=True)
class ProcessState:
    """A compute process as nvidia-smi reports it. ``pid`` is the host's number, also for a process in a container."""

    pid: int
    name: str
    used_memory_mib: int | None = None


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU. ``uuid`` identifies it: ``index`` can change at each boot."""

    index: int
    uuid: str
    name: str
    memory_total_mib: int | None = None
    memory_used_mib: int | None = None
    memory_free_mib: int | None = None
    utilization_pct: int | None = None
    memory_utilization_pct: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    clock_sm_mhz: int | None = None
    fan_pct: int | None = None
    pstate: str | None = None
    persistence: bool | None = None
    throttle: str | None = None
    pci_bus_id: str | None = None
    processes: tuple[ProcessState, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory. If ``size_vram_mib`` is less than ``size_mib``, a part of it runs on the CPU."""

    name: str
    size_vram_mib: int | None = None
    size_mib: int | None = None
    expires_at: datetime | None = None
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model in a backend's store. ``modified_at`` is the server's own text: its nanoseconds serve as a
    fingerprint."""

    name: str
    digest: str | None = None
    size_mib: int | None = None
    modified_at: str | None = None
    parameter_size: str | None = None
    quantization: str | None = None
    family: str | None = None


@dataclass(frozen=True, slots=True)
class BackendState:
    """The state of a node's inference server. ``url`` is the route in use. ``models`` are the names of the models in
    its store; ``catalog`` has their details.

    ``running``, ``waiting`` and ``kv_cache_pct`` are the server's own figures. ``running`` and ``waiting`` count the
    requests of all its clients. ``kv_cache_pct`` is the share of the memory for contexts that is in use, in percent.
    """

    kind: str
    state: BackendPhase = BackendPhase.UNKNOWN
    url: str | None = None
    version: str | None = None
    models: tuple[str, ...] = ()
    loaded: tuple[LoadedModel, ...] = ()
    latency_ms: float | None = None
    tokens_per_s: float | None = None
    last_error: str | None = None
    error_code: str | None = None
    catalog: tuple[ModelInfo, ...] = ()
    running: int | None = None
    waiting: int | None = None
    kv_cache_pct: int | None = None


@dataclass(frozen=True, slots=True)
class RouteState:
    """One route to a node's server. ``target`` is the server's address on its own host, ``url`` its address from here,
    ``via`` the transport. Only an inspection sets the other fields: ``latency_ms`` is the median of several round
    trips, ``store`` a fingerprint of the models' store, ``kind`` the kind of server that was found.

    ``offered``: the route is not in mesh.yaml; the host's own address answers without SSH too. ``exposed``: anybody on
    the internet can use it.
    """

    target: str
    url: str
    via: str
    state: BackendPhase = BackendPhase.UNKNOWN
    latency_ms: float | None = None
    error: str | None = None
    error_code: str | None = None
    store: str | None = None
    kind: str | None = None
    offered: bool = False
    exposed: bool = False


@dataclass(frozen=True, slots=True)
class LoadState:
    """The numbers of a node's requests. ``limit`` is the number of requests that the node really runs in parallel;
    ``None`` while that is unknown."""

    in_flight: int = 0
    queued: int = 0
    limit: int | None = None
    served: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class BrokenModelState:
    """A model that gets no requests on a node, because it failed there. ``name`` is its full name.

    ``why``: ``model-load`` (the server says that it cannot load it), ``model`` (the server fails before it has loaded
    it), ``missing-model`` (the server lists it, but answers that it is not there). ``error`` is the server's message
    about a load that failed.
    ``retry_in_s``: after this time one request is sent there as a trial.
    """

    name: str
    why: str
    error: str | None = None
    retry_in_s: float | None = None


@dataclass(frozen=True, slots=True)
class SlownessState:
    """How much slower a node is than it was and than the other nodes are. All values are ratios: 2.0 is twice as slow.

    ``factor`` multiplies the forecasts of its answers. ``first_token``: the time to the first token, against the
    node's own past. ``decode``: the time of each token. ``None`` where there are too few recent answers.
    """

    factor: float
    first_token: float | None = None
    decode: float | None = None


@dataclass(frozen=True, slots=True)
class NodeState:
    """The state of one node. ``reason`` says why ``health`` is as it is.

    ``gpus`` is ``None`` when the host's GPUs are not known, and empty when the host has none. ``noticed`` are the
    findings of the probes and of requests; the rules of `audit` add the findings that follow from mesh.yaml.
    ``slowness`` is ``None`` unless the node has become slow. ``learned`` are the figures of each model that was
    measured here, ``decisions`` the latest answered requests, ``loading`` the loads of the last minutes (``None``: no
    loads). ``pool_members``: the nodes of the pool that this node is; empty for any other node.
    """

    name: str
    health: Health
    reason: str | None
    tunnel: TunnelState
    backend: BackendState
    host: HostState = HostState()
    gpus: tuple[GpuState, ...] | None = None
    load: LoadState = LoadState()
    labels: tuple[tuple[str, str], ...] = ()
    simulated: bool = False
    routes: tuple[RouteState, ...] = ()
    noticed: tuple[Finding, ...] = ()
    broken_models: tuple[BrokenModelState, ...] = ()
    slowness: SlownessState | None = None
    learned: tuple[LearnedState, ...] = ()
    decisions: tuple[DecisionState, ...] = ()
    loading: LoadingState | None = None
    pool_members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the pool. A GPU that two nodes share counts once (by UUID). A sum leaves out unknown values; it is
    ``None`` when all its values are unknown."""

    nodes: int
    nodes_up: int
    gpus: int | None
    vram_total_mib: int | None
    vram_used_mib: int | None
    vram_free_mib: int | None
    tokens_per_s: float


class GatewayPhase(StrEnum):
    OFF = "off"
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class WaitingState:
    """A request that waits for a slot. The request at ``position`` 0 is the next; ``id`` is the client's X-Request-Id.

    ``node``: the only node that may serve the request, if the client named a node.
    """

    position: int
    priority: str
    model: str | None
    node: str | None
    waited_s: float
    id: str | None = None


@dataclass(frozen=True, slots=True)
class GatewayState:
    """The state of the gateway. ``waiting``: the first of the ``queued`` requests. ``socket`` is the path of the Unix
    socket. ``url`` is ``unix:PATH`` when the gateway listens on that socket only."""

    url: str | None = None
    state: GatewayPhase = GatewayPhase.OFF
    in_flight: int = 0
    queued: int = 0
    waiting: tuple[WaitingState, ...] = ()
    socket: str | None = None
    access: LocalAccess | None = None


@dataclass(frozen=True, slots=True)
class MeshState:
    """A snapshot of the whole mesh. ``gateways``: empty without `redis` in mesh.yaml; else this gateway first."""

    mesh: str
    at: datetime
    gateway: GatewayState
    totals: Totals
    nodes: tuple[NodeState, ...]
    findings: tuple[Finding, ...] = ()
    gateways: tuple[MeshGatewayState, ...] = ()

    def node(self, name: str) -> NodeState:
        """Returns the state of the node with this name. Raises ``KeyError`` when there is no such node."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)


def compute_totals(nodes: tuple[NodeState, ...]) -> Totals:
    """Returns the sums over these nodes. Each GPU counts once, by its UUID. Unknown values are left out of the sums."""
    gpus_by_uuid = {gpu.uuid: gpu for node in nodes for gpu in node.gpus or ()}
    gpus = gpus_by_uuid.values()
    is_gpu_count_known = any(node.gpus is not None for node in nodes)  # one known node is enough for a sum
    return Totals(
        nodes=len(nodes),
        nodes_up=sum(node.health.is_serving for node in nodes),
        gpus=len(gpus) if is_gpu_count_known else None,
        vram_total_mib=_sum_known([gpu.memory_total_mib for gpu in gpus]),
        vram_used_mib=_sum_known([gpu.memory_used_mib for gpu in gpus]),
        vram_free_mib=_sum_known([free_mib(gpu) for gpu in gpus]),
        tokens_per_s=sum(node.backend.tokens_per_s or 0.0 for node in nodes),
    )


def _sum_known(values: list[int | None]) -> int | None:
    """Returns the sum of the values that are known; ``None`` when no value is known."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) if numbers else None


def free_mib(gpu: GpuState) -> int | None:
    """Returns the GPU's free memory in MiB, or ``None`` when it is not known.

    The driver's own figure takes precedence: the driver keeps a reserve, so used + free is less than total.
    """
    if gpu.memory_free_mib is not None:
        return gpu.memory_free_mib
    if gpu.memory_total_mib is None or gpu.memory_used_mib is None:
        return None
    return max(gpu.memory_total_mib - gpu.memory_used_mib, 0)  # a host may report figures that contradict each other
