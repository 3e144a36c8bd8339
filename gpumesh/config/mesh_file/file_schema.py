"""The schema of mesh.yaml: the keys of each section, and the values that each key accepts.

``rules`` has the rules between keys. Almost all keys are optional, because a node's value may come from ``defaults``;
``None`` means that the file does not give the key. Descriptions go into the JSON Schema (json_schema.py) and the docs.
"""

from __future__ import annotations

from typing import Any

from gpumesh.config import listen_address, value_parsers
from gpumesh.config.mesh_file.value_types import (
    NUMBER,
    TRUE_OR_FALSE,
    Choice,
    JsonSchema,
    ListOf,
    MappingOf,
    Nullable,
    Scalar,
    Section,
    SectionOf,
    duration,
    integer,
    list_of_sections,
    optional,
    required,
    text,
)
from gpumesh.topology import (
    BackendKind,
    EventKind,
    HostKeyPolicy,
    NotifyFormat,
    PolicyKind,
    Priority,
    ReloadMode,
    RequestRate,
    Target,
    TransportKind,
    TunnelListen,
)


def _one_or_list(member: JsonSchema, **list_keywords: Any) -> JsonSchema:
    """Returns the JSON Schema for a list of ``member``, or a single one. ``list_keywords`` are further keywords of the
    list's schema."""
    return {"anyOf": [member, {"type": "array", "items": member, **list_keywords}]}


# -- single values ---------------------------------------------------------------------------------------------------

ANY_TEXT = text(str)
NAME = text(value_parsers.parse_name, pattern=value_parsers.NAME_PATTERN)
LINE = text(value_parsers.parse_line)
PORT = integer(1, 65535)
HOST = text(value_parsers.parse_host)
USER = text(value_parsers.parse_user)
ALIAS = text(value_parsers.parse_alias)
VARIABLE = text(value_parsers.parse_variable_name, pattern="^[A-Za-z_][A-Za-z0-9_]*$")
PATH = text(value_parsers.parse_path)
JUMP = text(value_parsers.parse_jump)
LISTEN_ENTRY = text(listen_address.parse_listen_entry, examples=["127.0.0.1:11430", "unix:/run/user/1000/gpumesh.sock"])
URL = text(value_parsers.parse_url, pattern="^https?://", examples=["http://127.0.0.1:11434"])
WEBHOOK = text(value_parsers.parse_webhook, pattern="^https?://", examples=["https://example.org/hook"])
REDIS_URL = text(value_parsers.parse_redis_url, examples=["redis://localhost:6379/0"])
SHA256 = text(value_parsers.parse_sha256, pattern=value_parsers.SHA256_PATTERN)
ORIGIN = text(value_parsers.parse_origin)
INTERVAL = duration(0.1, 300)
LONG_WAIT = duration(0.1, 86400)
QUIET = duration(1, 7 * 86400)
HEARTBEAT = Scalar(
    value_parsers.parse_heartbeat,
    {
        "anyOf": [
            {"type": "string", "pattern": rf"^off$|{value_parsers.DURATION_PATTERN}", "examples": ["10s", "off"]},
            {"const": False},  # a YAML parser may read ``off`` as false
        ]
    },
)
WEIGHT = Scalar(value_parsers.parse_weight, {"type": "number", "exclusiveMinimum": 0, "maximum": 1000}, NUMBER)
HOURLY_PRICE = Scalar(
    value_parsers.parse_hourly_price,
    {"type": "number", "minimum": 0, "maximum": value_parsers.MAX_HOURLY_PRICE},
    NUMBER,
)
RATE = Scalar(
    value_parsers.parse_rate,
    {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": value_parsers.RATE_PATTERN, "examples": ["60/m"]},
        ]
    },
)
TOKENS = Scalar(
    value_parsers.parse_tokens,
    {
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": value_parsers.MOST_TOKENS},
            {"type": "string", "pattern": value_parsers.TOKENS_PATTERN, "examples": ["2M"]},
        ]
    },
)
BOOLEAN = Scalar(value_parsers.parse_boolean, {"type": "boolean"}, TRUE_OR_FALSE)

# -- lists -----------------------------------------------------------------------------------------------------------

_TEXT = ANY_TEXT.schema

PATHS = ListOf(PATH, _one_or_list(_TEXT))
JUMPS = ListOf(JUMP, _one_or_list(_TEXT), split=value_parsers.split_jumps)
LINES = ListOf(LINE, _one_or_list(_TEXT))
COMMAND = ListOf(ANY_TEXT, _one_or_list(_TEXT, minItems=1), value_parsers.parse_command, value_parsers.check_argv)
LISTEN = ListOf(LISTEN_ENTRY, _one_or_list(LISTEN_ENTRY.schema, minItems=1, maxItems=2))
URLS = ListOf(URL, {"type": "array", "items": URL.schema, "minItems": 1, "maxItems": 16})
NODE_NAMES = ListOf(NAME, _one_or_list(_TEXT, minItems=1))
MODELS = ListOf(LINE, _one_or_list(_TEXT, minItems=1))
CONTEXT_STEPS = ListOf(
    integer(1, 1 << 31), {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1}
)
ORIGINS = ListOf(ORIGIN, _one_or_list(_TEXT))
_EVENT = Choice(EventKind)
EVENTS = ListOf(_EVENT, _one_or_list(_EVENT.schema, minItems=1))

# -- sections --------------------------------------------------------------------------------------------------------


class Ssh(Section):
    """How to reach the host by SSH. A node without `ssh` is reached directly."""

    host: str | None = optional(HOST, "Name or address of the host.")
    port: int | None = optional(PORT, "The SSH port; 22 if not given.")
    user: str | None = optional(USER, "The user to log in as; your own name if not given, as with ssh.")
    identity_file: tuple[str, ...] | None = optional(
        PATHS, "Private key file, or a list of them to try in order. A .pub: its key is in the agent."
    )
    known_hosts: str | None = optional(PATH, "File of known host keys; ~/.ssh/known_hosts if not given.")
    host_key_policy: HostKeyPolicy | None = optional(
        Choice(HostKeyPolicy), "strict (default): an unknown host key is refused. accept-new: it is recorded."
    )
    proxy_jump: tuple[str, ...] | None = optional(JUMPS, "[user@]host[:port] to go through; a list or a,b for a chain.")
    password_env: str | None = optional(VARIABLE, "Name of the variable that holds the password.")
    passphrase_env: str | None = optional(VARIABLE, "Name of the variable with the key's passphrase.")
    agent: bool | None = optional(BOOLEAN, "Whether keys of the SSH agent are tried; true if not given.")
    identities_only: bool | None = optional(
        BOOLEAN, "Of the agent's keys, only those of `identity_file` are tried; false if not given."
    )
    alias: str | None = optional(ALIAS, "A Host of ~/.ssh/config: its settings hold where this file is silent.")
    transport: TransportKind | None = optional(
        Choice(TransportKind), "sshtunnel (default), or openssh: the system's ssh, for what only it can do."
    )
    connect_timeout: float | None = optional(INTERVAL, "Time for one attempt; 6s if not given.")
    keepalive: float | None = optional(INTERVAL, "How often the host is asked for a sign of life; 2s if not given.")


class Backend(Section):
    """The inference server of a node. One of `port`, `url` and `urls` says where it is."""

    kind: BackendKind | None = optional(
        Choice(BackendKind),
        "auto (default): found by asking; ollama, llamacpp, vllm, or openai: any other with its API.",
    )
    port: int | None = optional(
        PORT, "Its port on 127.0.0.1 of the SSH host; its kind's usual one, 11434 for auto, if not given."
    )
    url: Target | None = optional(URL, "Where it is, as seen from the SSH host, or from here without ssh.")
    urls: tuple[Target, ...] | None = optional(URLS, "Candidates: the first that answers is used.")
    api_key_env: str | None = optional(VARIABLE, "Name of the variable that holds the server's API key.")
    max_parallel: int | None = optional(integer(1, 4096), "How many requests it runs at once; learned if not given.")


class Expect(Section):
    """What you believe to be there; `gpumesh audit` compares."""

    hostname: str | None = optional(LINE, "What `hostname` prints there.")
    gpus: int | None = optional(integer(0, 1024), "Number of GPUs.")
    gpu: str | None = optional(LINE, "The GPU's name, as nvidia-smi prints it.")
    vram_mib: int | None = optional(integer(1, 1 << 30), "Memory of one GPU in MiB.")
    driver: str | None = optional(LINE, "The driver's version, or how it begins.")
    models: tuple[str, ...] | None = optional(LINES, "Models that must be there.")


class AddressFrom(Section):
    """Where the host is today, for addresses that change (RunPod, vast.ai)."""

    command: tuple[str, ...] = required(COMMAND, "Run without a shell; prints `host port`, or JSON with both.")
    timeout: float | None = optional(INTERVAL, "Time for the command; 20s if not given.")


class NodeDefaults(Section):
    """Merged under every node. `ssh` only under those that have an `ssh` of their own."""

    ssh: Ssh | None = optional(SectionOf(Ssh))
    backend: Backend | None = optional(SectionOf(Backend))
    expect: Expect | None = optional(SectionOf(Expect))
    weight: float | None = optional(WEIGHT, "Share of the work relative to other nodes; 1 if not given.")
    tier: int | None = optional(
        integer(1, 1000),
        "1 if not given. A node of a higher tier is used only when the lower ones are full, away or much slower.",
    )
    eur_per_hour: float | None = optional(
        HOURLY_PRICE, "Rent of the host in EUR an hour: `bench` reckons the price of tokens with it."
    )
    labels: dict[str, str] | None = optional(MappingOf(NAME, LINE), "Words of your own, shown by `status --json`.")
    enabled: bool | None = optional(BOOLEAN, "false: the node stays in the file and is left alone.")


class Node(NodeDefaults):
    """One host with one inference server."""

    name: str = required(NAME, "Letters, digits, dots, hyphens, underscores.")
    address_from: AddressFrom | None = optional(SectionOf(AddressFrom))


class ApiKey(Section):
    """An API key of one user or program. One of `env`, `file` and `hash` says which key it is."""

    name: str = required(NAME, "Who holds the key: shown in tables, and the client whose share is counted.")
    env: str | None = optional(VARIABLE, "Name of the variable that holds the key.")
    file: str | None = optional(PATH, "File that holds nothing but the key; relative to mesh.yaml.")
    hash: str | None = optional(SHA256, "The key's SHA-256 in hexadecimal: `gpumesh config hash-key` makes it.")
    priority: Priority | None = optional(
        Choice(Priority), "Of requests that ask for none: interactive, normal or batch."
    )
    nodes: tuple[str, ...] | None = optional(NODE_NAMES, "The only nodes that it may use; all if not given.")
    models: tuple[str, ...] | None = optional(MODELS, "The only models that it may use; all if not given.")
    rate: RequestRate | None = optional(
        RATE, "How often it may ask a model: 60 (in a minute), 10/s, 60/m, 1000/h, 5000/d; no limit if not given."
    )
    tokens_per_month: int | None = optional(
        TOKENS, "Tokens of prompts and answers in a month of the calendar (UTC): 2000000, 500k, 2M."
    )


class Gateway(Section):
    """The one endpoint that clients use."""

    listen: tuple[tuple[str, int] | str, ...] | None = optional(
        LISTEN,
        "HOST:PORT, unix:PATH, or a list of one of each; 127.0.0.1:11430 if not given. Port 0 is any free "
        "one. A Unix socket is for your own user (0600).",
    )
    api_key_env: str | None = optional(
        VARIABLE, "Name of the variable with the key that clients must send; needed beyond loopback."
    )
    keys: tuple[ApiKey, ...] | None = optional(
        list_of_sections(ApiKey), "Keys of single users and programs, each with what it may use."
    )
    route_priority: dict[str, Priority] | None = optional(
        MappingOf(ANY_TEXT, Choice(Priority)),
        "The class of requests to a route that ask for none, such as `/api/embed: batch`.",
    )
    heartbeat: dict[str, float] | None = optional(
        MappingOf(ANY_TEXT, HEARTBEAT),
        "After how long a silent stream of a route gets a sign of life, or off, such as "
        "`/v1/messages: 30s`; 10s for the routes of /v1 if not given, off for those of /api.",
    )
    default_model: str | None = optional(LINE, "Used where a command is given no model.")
    policy: PolicyKind | None = optional(Choice(PolicyKind), "How a node is chosen; adaptive if not given.")
    max_queue: int | None = optional(
        integer(0, 1_000_000), "How many requests may wait; 1024 if not given. Past it clients get 503."
    )
    body_memory_mib: int | None = optional(
        integer(16, 1 << 20), "Memory for the bodies of all requests together; 512 if not given. Past it 503."
    )
    timeout: float | None = optional(LONG_WAIT, "For one request as a whole; 10m if not given.")
    cors_origins: tuple[str, ...] | None = optional(ORIGINS, "Web pages that may use the gateway, by their origin.")
    access_log: bool | None = optional(
        BOOLEAN, "Whether a line is kept for each request, without its prompt; true if not given."
    )
    reload: ReloadMode | None = optional(
        Choice(ReloadMode),
        "auto (default): a running mesh takes over changes of this file by itself. manual: at `gpumesh reload` or "
        "SIGHUP only.",
    )


class Tunnels(Section):
    """The local ends of the SSH tunnels, which other programs may use."""

    share: bool | None = optional(
        BOOLEAN,
        "true: all users of this machine may connect to the forwarded ports; if not given, only your own "
        "user and root (on Linux; elsewhere the system does not tell).",
    )
    listen: TunnelListen | None = optional(
        Choice(TunnelListen),
        "tcp (default): a port on 127.0.0.1 for each node. unix: a Unix socket in the runtime folder, for "
        "your own user.",
    )


class Model(Section):
    """What holds for one model, whatever node has it."""

    nodes: tuple[str, ...] | None = optional(
        NODE_NAMES,
        "The only nodes that serve it, each of which should have it in memory; `all` for every node. Any "
        "node that has the model if not given.",
    )
    prefer: tuple[str, ...] | None = optional(NODE_NAMES, "Nodes that serve it first, as those of a lower tier.")
    copies: int | None = optional(
        integer(1, 4096),
        "On how many of its nodes it should be in memory; on all of `nodes`, or else as its demand "
        "requires, if not given.",
    )
    pinned: bool | None = optional(BOOLEAN, "true: no other model pushes those copies out. false if not given.")
    context_steps: tuple[int, ...] | None = optional(
        CONTEXT_STEPS, "Contexts in tokens, rising: what a client asks for (`num_ctx`) is rounded up to one of them."
    )
    aliases: tuple[str, ...] | None = optional(
        MODELS, "Other names of the same model, which clients may use and servers may list."
    )
    fallback: str | None = optional(LINE, "The model that serves a request if no node can with this.")


class Redis(Section):
    """Optional: several gateways share what they have in flight."""

    url: str = required(REDIS_URL, "redis://, rediss:// or unix://, without a password.")
    password_env: str | None = optional(VARIABLE, "Name of the variable that holds Redis's password.")


class Notify(Section):
    """Who is told of what. One of `webhook`, `webhook_env`, `command` and `desktop` says who."""

    webhook: str | None = optional(WEBHOOK, "URL to which each message is posted.")
    webhook_env: str | None = optional(VARIABLE, "Name of the variable with that URL, where it is a secret.")
    command: tuple[str, ...] | None = optional(
        COMMAND, "Run without a shell for each message, which it gets as JSON on its standard input."
    )
    desktop: bool | None = optional(BOOLEAN, "true: shown on the desktop of this machine.")
    token_env: str | None = optional(VARIABLE, "Name of the variable with a token for the webhook.")
    format: NotifyFormat | None = optional(
        Choice(NotifyFormat), "Of a webhook: json (default), slack, discord or ntfy."
    )
    on: tuple[EventKind, ...] | None = optional(EVENTS, "The events to be told of; all if not given.")
    quiet: float | None = optional(QUIET, "Least time between two messages about one node; 5m if not given.")


class MeshFile(Section):
    """A mesh: GPUs behind SSH as one endpoint."""

    version: int | None = optional(integer(1, 1), "Of this format: 1.")
    name: str | None = optional(NAME, "Of the mesh; `mesh` if not given.")
    gateway: Gateway | None = optional(SectionOf(Gateway))
    tunnels: Tunnels | None = optional(SectionOf(Tunnels))
    defaults: NodeDefaults | None = optional(SectionOf(NodeDefaults))
    nodes: tuple[Node, ...] = required(list_of_sections(Node), "The hosts, at least one.")
    redis: Redis | None = optional(SectionOf(Redis))
    models: dict[str, Model | None] | None = optional(
        MappingOf(LINE, Nullable(SectionOf(Model))), "Rules for single models, by their names."
    )
    notify: tuple[Notify, ...] | None = optional(list_of_sections(Notify), "Who is told when something happens.")
