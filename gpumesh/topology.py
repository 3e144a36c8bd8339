"""The content of mesh.yaml (docs/configuration.md) as frozen specs: validated, defaults merged, variables expanded.

Specs hold nothing observed, and no secret: only the names of the variables that hold secrets. Durations are seconds,
sizes MiB, ports 1 to 65535.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

from gpumesh.pool_spec import PoolSpec
from gpumesh.text.addresses import format_address, is_loopback


class TransportKind(StrEnum):
    SSHTUNNEL = "sshtunnel"
    OPENSSH = "openssh"


class HostKeyPolicy(StrEnum):
    STRICT = "strict"  # a host key that is not in known_hosts is refused
    ACCEPT_NEW = "accept-new"  # such a key is recorded, as with OpenSSH


class BackendKind(StrEnum):
    """A kind of inference server. Only a spec can have ``AUTO``: a probe then asks the server for its kind."""

    AUTO = "auto"
    OLLAMA = "ollama"
    LLAMACPP = "llamacpp"
    VLLM = "vllm"
    OPENAI = "openai"
    """Any other server with OpenAI's API."""


class PolicyKind(StrEnum):
    ROUND_ROBIN = "round-robin"
    LEAST_LOADED = "least-loaded"
    POWER_OF_TWO = "power-of-two"
    ADAPTIVE = "adaptive"


class Priority(StrEnum):
    """The class of a request: it decides how soon a waiting request gets a slot (``balancer/fair_queue.py``)."""

    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BATCH = "batch"


class ReloadMode(StrEnum):
    """When a running mesh takes over a change of its mesh.yaml."""

    AUTO = "auto"  # soon after the file was written
    MANUAL = "manual"  # when it is asked to: `gpumesh reload`, SIGHUP


class TunnelListen(StrEnum):
    TCP = "tcp"
    UNIX = "unix"


@dataclass(frozen=True, slots=True)
class RequestRate:
    """At most ``requests`` at once, and as many in each ``period_s`` seconds after that."""

    requests: int
    period_s: float


@dataclass(frozen=True, slots=True)
class KeySpec:
    """An API key of the gateway, and what its holder may use. Exactly one of ``env``, ``file`` and ``sha256`` is set.

    - ``env``: the name of the variable that holds the key. ``sha256``: the SHA-256 of the key, in hexadecimal.
      ``file``: a file that holds nothing but the key.
    - ``priority``: the class of a request that asks for none; ``None``: this key changes nothing.
    - ``nodes``, ``models``: the only nodes and models that the holder may use; ``None``: all.
    - ``rate``: how often the holder may ask a model; ``tokens_per_month``: how many tokens, those of prompts included,
      the holder may use in a month of the calendar in UTC; ``None``: no limit.
    """

    name: str
    env: str | None = None
    sha256: str | None = None
    priority: Priority | None = None
    nodes: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    file: Path | None = None
    rate: RequestRate | None = None
    tokens_per_month: int | None = None


# The routes whose streams can get a sign of life, and after how many silent seconds they do if mesh.yaml does not say.
# nginx, Cloudflare and the balancers of AWS and Azure cut a silent connection after 60 to 240 s, some others after 30.
# The routes of Ollama's API do not get any unless asked: see docs/gateway.md.
HEARTBEAT_S: Mapping[str, float] = MappingProxyType(
    {
        "/v1/chat/completions": 10.0,
        "/v1/completions": 10.0,
        "/v1/responses": 10.0,
        "/v1/messages": 10.0,
        "/api/chat": 0.0,
        "/api/generate": 0.0,
    }
)


@dataclass(frozen=True, slots=True)
class GatewaySpec:
    """The single endpoint of the mesh. The key ``listen`` of mesh.yaml sets ``host`` and ``port`` (0: any free port),
    ``socket`` (the path of a Unix socket), or both. ``host`` is ``None`` when the gateway listens on the Unix socket
    only.

    ``api_key_env`` is the name of the variable with the key for everybody, ``keys`` are the keys of single users.
    ``route_priority`` has the class of requests to a route (``/api/embed``) that ask for none. ``heartbeat_s`` has the
    seconds after which a silent stream of a route gets a sign of life; 0: never."""

    host: str | None = "127.0.0.1"
    port: int = 11430
    api_key_env: str | None = None
    default_model: str | None = None
    policy: PolicyKind = PolicyKind.ADAPTIVE
    max_queue: int = 1024
    timeout_s: float = 600.0
    cors_origins: tuple[str, ...] = ()
    access_log: bool = True
    socket: Path | None = None
    body_memory_mib: int = 512
    keys: tuple[KeySpec, ...] = ()
    route_priority: Mapping[str, Priority] = field(default_factory=lambda: MappingProxyType({}))
    heartbeat_s: Mapping[str, float] = field(default_factory=lambda: HEARTBEAT_S)
    reload: ReloadMode = ReloadMode.AUTO

    @property
    def needs_key(self) -> bool:
        """Whether clients must send an API key."""
        return self.api_key_env is not None or bool(self.keys)

    @property
    def key_variables(self) -> tuple[str, ...]:
        """The names of the variables that hold API keys of clients."""
        named_variables = [key.env for key in self.keys]
        return tuple(name for name in (self.api_key_env, *named_variables) if name is not None)


@dataclass(frozen=True, slots=True)
class AddressCommand:
    """The user's command of ``address_from``, which prints a host's address: ``host port``, or JSON with both."""

    command: tuple[str, ...]
    timeout_s: float = 20.0


@dataclass(frozen=True, slots=True)
class JumpAlias:
    """What ``~/.ssh/config`` has for a jump host: the ``name`` of its ``Host`` there, its key files, and its
    known_hosts files. Where there are none, those of the node are used."""

    name: str
    identity_files: tuple[Path, ...] = ()
    known_hosts: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class SshSpec:
    """The values that are needed to reach a host by SSH. ``user`` is never empty. ``identity_files`` may be empty: an
    agent or a password can take their place. ``identities_only``: of the agent's keys only those are tried that belong
    to one of ``identity_files``. ``keys_of_alias``: ``identity_files`` are those that ``~/.ssh/config`` has for
    ``alias``, where the system's ssh finds them itself. ``host`` is empty if only ``address_from`` knows the host.

    Host keys are recorded in ``known_hosts``; ``more_known_hosts`` are only read. ``jump_aliases`` has an entry for
    each of ``proxy_jump``, ``None`` for a host that ``~/.ssh/config`` does not know; it is empty if it knows none.
    """

    host: str
    port: int = 22
    user: str = "root"
    identity_files: tuple[Path, ...] = ()
    known_hosts: Path = Path("~/.ssh/known_hosts")
    host_key_policy: HostKeyPolicy = HostKeyPolicy.STRICT
    proxy_jump: tuple[str, ...] = ()
    password_env: str | None = None
    passphrase_env: str | None = None
    agent: bool = True
    identities_only: bool = False
    alias: str | None = None
    keys_of_alias: bool = False
    transport: TransportKind = TransportKind.SSHTUNNEL
    connect_timeout_s: float = 6.0
    keepalive_s: float = 2.0
    address_from: AddressCommand | None = None
    more_known_hosts: tuple[Path, ...] = ()
    jump_aliases: tuple[JumpAlias | None, ...] = ()

    @property
    def known_hosts_files(self) -> tuple[Path, ...]:
        """All files that may have the host's key."""
        return (self.known_hosts, *self.more_known_hosts)


@dataclass(frozen=True, slots=True)
class Target:
    """An address of a backend, as seen from the node's host (through SSH) or from here (direct)."""

    host: str
    port: int
    scheme: str = "http"
    path: str = ""

    @property
    def url(self) -> str:
        return f"{self.scheme}://{format_address(self.host, self.port)}{self.path}"


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """The inference server of a node. ``targets`` are in order of preference: the first that answers is used."""

    kind: BackendKind = BackendKind.AUTO
    targets: tuple[Target, ...] = (Target("127.0.0.1", 11434),)
    api_key_env: str | None = None
    max_parallel: int | None = None


@dataclass(frozen=True, slots=True)
class ExpectSpec:
    """The values that the user expects of a node. ``None`` means that any value is fine."""

    hostname: str | None = None
    gpus: int | None = None
    gpu: str | None = None
    vram_mib: int | None = None
    driver: str | None = None
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One host with one inference server. ``ssh`` is ``None`` for a direct node. ``tier`` is 1 or more: a node of a
    lower tier is used first. ``eur_per_hour`` is the rent of the host; ``None`` if it is not known. ``pool_members`` is
    not in mesh.yaml: the nodes whose GPUs serve a running pool, of which this is the node."""

    name: str
    backend: BackendSpec
    ssh: SshSpec | None = None
    expect: ExpectSpec = ExpectSpec()
    weight: float = 1.0
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    enabled: bool = True
    tier: int = 1
    eur_per_hour: float | None = None
    pool_members: tuple[str, ...] = ()

    @property
    def has_host(self) -> bool:
        """Whether programs can be run on its host: over SSH, or because it is this machine."""
        return self.ssh is not None or any(is_loopback(target.host) for target in self.backend.targets)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The rules of mesh.yaml for one model.

    - ``nodes``: the only nodes that serve the model; ``None``: every node that has it.
    - ``prefer``: the nodes that serve it first, as nodes of a lower tier do. They are a part of ``nodes``.
    - ``wanted_copies``: on how many of its nodes the model should be in memory; ``None``: as its demand requires.
    - ``pinned``: no other model may push those copies out of memory.
    - ``context_steps``: a context (``num_ctx``) that a client asks for is rounded up to one of these, in tokens, in
      rising order; empty: it is left as it is.
    - ``aliases``: other names of the same model, for clients and for servers.
    - ``fallback``: the model that serves a request if no node can serve it with this one; ``None``: no other model.
    """

    name: str
    nodes: tuple[str, ...] | None = None
    prefer: tuple[str, ...] = ()
    wanted_copies: int | None = None
    pinned: bool = False
    context_steps: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    fallback: str | None = None


@dataclass(frozen=True, slots=True)
class TunnelsSpec:
    """The local ends of the tunnels of all SSH nodes. ``share``: every user of this machine may use the tunnels.
    ``listen`` is the kind of the local ends: ports on loopback, or Unix sockets that only this user can open."""

    share: bool = False
    listen: TunnelListen = TunnelListen.TCP


DEFAULT_TUNNELS = TunnelsSpec()


@dataclass(frozen=True, slots=True)
class RedisSpec:
    """The Redis through which gateways share their nodes. ``url`` holds no password. ``ca_file`` has the certificates
    that may sign the server's; ``None``: those of the system. The rest are names of variables."""

    url: str
    password_env: str | None = None
    ca_file: str | None = None
    sentinel_password_env: str | None = None


class EventKind(StrEnum):
    """What people can be told of (``notify`` in mesh.yaml)."""

    NODE_DOWN = "node-down"
    NODE_UP = "node-up"
    ALL_DOWN = "all-down"
    HOST_KEY_CHANGED = "host-key-changed"
    MODEL_MISSING = "model-missing"
    THRASHING = "thrashing"
    DISK_FULL = "disk-full"


class NotifyFormat(StrEnum):
    """The form of the message to a webhook."""

    JSON = "json"
    SLACK = "slack"
    DISCORD = "discord"
    NTFY = "ntfy"


@dataclass(frozen=True, slots=True)
class NotifySpec:
    """One rule of ``notify``: who is told of what. The receiver is one of ``webhook`` (a URL), ``webhook_env`` (the
    name of the variable that holds the URL), ``command`` and ``desktop``. ``token_env``: the variable of a token for
    the webhook. ``quiet_s``: the least time between two messages about one node."""

    webhook: str | None = None
    webhook_env: str | None = None
    command: tuple[str, ...] = ()
    desktop: bool = False
    token_env: str | None = None
    format: NotifyFormat = NotifyFormat.JSON
    on: frozenset[EventKind] = frozenset(EventKind)
    quiet_s: float = 300.0

    @property
    def receiver(self) -> str:
        """The receiver in a few words, without the address of a webhook, which can be a secret."""
        if self.command:
            return f"command {self.command[0]}"
        if self.desktop:
            return "desktop"
        return f"webhook ({self.format})" if self.webhook_env is None else f"webhook ${self.webhook_env}"


@dataclass(frozen=True, slots=True)
class Topology:
    """A whole mesh. ``source`` is the resolved path of its file, or ``None`` if it was made in memory."""

    name: str
    nodes: tuple[NodeSpec, ...]
    gateway: GatewaySpec = GatewaySpec()
    redis: RedisSpec | None = None
    source: Path | None = None
    tunnels: TunnelsSpec = DEFAULT_TUNNELS
    models: tuple[ModelSpec, ...] = ()
    notify: tuple[NotifySpec, ...] = ()
    pools: tuple[PoolSpec, ...] = ()

    @property
    def identity(self) -> str:
        """Tells this mesh apart from the other meshes of the user: the path of its file, or the name of a mesh that was
        made in memory."""
        return self.name if self.source is None else str(self.source)

    @property
    def secret_variables(self) -> frozenset[str]:
        """The names of the environment variables that hold this mesh's secrets."""
        names: list[str | None] = [*self.gateway.key_variables]
        if self.redis is not None:
            names += [self.redis.password_env, self.redis.sentinel_password_env]
        for rule in self.notify:
            names += [rule.webhook_env, rule.token_env]
        for node in self.nodes:
            names.append(node.backend.api_key_env)
            if node.ssh is not None:
                names += [node.ssh.password_env, node.ssh.passphrase_env]
        return frozenset(name for name in names if name is not None)

    def node(self, name: str) -> NodeSpec:
        """Returns the spec of the node with this name. Raises ``KeyError`` when there is no such node."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)
