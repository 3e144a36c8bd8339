"""The schema of mesh.yaml as pydantic models: the keys that exist, and the values that each key accepts.

``rules`` has the rules between keys. All values arrive as text (yaml_tree.py), so each type here parses text. Almost
all fields are optional, because a node's value may come from ``defaults``; ``None`` means that the file does not give
the key. Descriptions go into the JSON Schema and the docs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from gpumesh.config import listen_address, value_parsers
from gpumesh.topology import BackendKind, HostKeyPolicy, PolicyKind, Priority, Target, TransportKind, TunnelListen

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"


def _parse_with(parse: Callable[[str], Any]) -> BeforeValidator:
    """Returns a validator that parses text with ``parse``. It leaves any other value to pydantic, which reports the
    wrong type."""

    def parse_text(value: Any) -> Any:
        return parse(value) if isinstance(value, str) else value

    return BeforeValidator(parse_text)


def _as_tuple(value: Any) -> Any:
    """Returns a single text as a tuple with one member: the file may give one value in the place of a list."""
    return (value,) if isinstance(value, str) else value


def _split_jumps(value: Any) -> Any:
    """Splits a text ``a,b``, a chain of jump hosts as ssh writes it, at its commas. Returns a list as it is."""
    return tuple(value.split(",")) if isinstance(value, str) else value


def _parse_command(value: Any) -> Any:
    """Splits a command that is one text into its arguments. Returns a list as it is, but refuses an empty list."""
    if isinstance(value, str):
        return value_parsers.parse_command(value)
    if value == []:
        return value_parsers.check_argv(value)  # raises the ValueError
    return value


def _integer_between(minimum: int, maximum: int) -> BeforeValidator:
    """Returns a validator that turns text into an integer from ``minimum`` to ``maximum``."""
    return _parse_with(lambda text: value_parsers.check_range(value_parsers.parse_integer(text), minimum, maximum, str))


def _integer_schema(minimum: int, maximum: int) -> WithJsonSchema:
    """Returns the JSON Schema for ``_integer_between``."""
    return WithJsonSchema({"type": "integer", "minimum": minimum, "maximum": maximum})


def _duration_between(minimum: float, maximum: float) -> BeforeValidator:
    """Returns a validator that turns text such as ``500ms`` into seconds, from ``minimum`` to ``maximum`` seconds."""

    def parse_seconds(text: str) -> float:
        seconds = value_parsers.parse_duration(text)
        return value_parsers.check_range(seconds, minimum, maximum, value_parsers.format_duration)

    return _parse_with(parse_seconds)


def _list_schema(member: dict[str, Any], **list_keywords: Any) -> WithJsonSchema:
    """Returns the JSON Schema for a list of ``member``, or a single one. ``list_keywords`` are further keywords of the
    list's schema."""
    return WithJsonSchema({"anyOf": [member, {"type": "array", "items": member, **list_keywords}]})


_TEXT = {"type": "string"}

Name = Annotated[
    str, _parse_with(value_parsers.parse_name), WithJsonSchema({**_TEXT, "pattern": value_parsers.NAME_PATTERN})
]
Line = Annotated[str, _parse_with(value_parsers.parse_line)]
Port = Annotated[int, _integer_between(1, 65535), _integer_schema(1, 65535)]
Host = Annotated[str, _parse_with(value_parsers.parse_host)]
User = Annotated[str, _parse_with(value_parsers.parse_user)]
Alias = Annotated[str, _parse_with(value_parsers.parse_alias)]
Variable = Annotated[
    str,
    _parse_with(value_parsers.parse_variable_name),
    WithJsonSchema({**_TEXT, "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}),
]
FilePath = Annotated[str, _parse_with(value_parsers.parse_path)]
FilePaths = Annotated[tuple[FilePath, ...], BeforeValidator(_as_tuple), _list_schema(_TEXT)]
Jump = Annotated[str, _parse_with(value_parsers.parse_jump)]
Jumps = Annotated[tuple[Jump, ...], BeforeValidator(_split_jumps), _list_schema(_TEXT)]
LineList = Annotated[tuple[Line, ...], BeforeValidator(_as_tuple), _list_schema(_TEXT)]
Command = Annotated[tuple[str, ...], BeforeValidator(_parse_command), _list_schema(_TEXT, minItems=1)]
_LISTEN_SCHEMA = {**_TEXT, "examples": ["127.0.0.1:11430", "unix:/run/user/1000/gpumesh.sock"]}
ListenPlace = Annotated[tuple[str, int] | str, _parse_with(listen_address.parse_listen_entry)]
Listen = Annotated[
    tuple[ListenPlace, ...], BeforeValidator(_as_tuple), _list_schema(_LISTEN_SCHEMA, minItems=1, maxItems=2)
]
_URL_SCHEMA = {**_TEXT, "pattern": "^https?://", "examples": ["http://127.0.0.1:11434"]}
Url = Annotated[Target, _parse_with(value_parsers.parse_url), WithJsonSchema(_URL_SCHEMA)]
Urls = Annotated[
    tuple[Url, ...],
    BeforeValidator(_as_tuple),
    WithJsonSchema({"type": "array", "items": _URL_SCHEMA, "minItems": 1, "maxItems": 16}),
]
_DURATION_SCHEMA = WithJsonSchema({**_TEXT, "pattern": value_parsers.DURATION_PATTERN, "examples": ["5s"]})
Interval = Annotated[float, _duration_between(0.1, 300), _DURATION_SCHEMA]
LongWait = Annotated[float, _duration_between(0.1, 86400), _DURATION_SCHEMA]
RedisUrl = Annotated[
    str, _parse_with(value_parsers.parse_redis_url), WithJsonSchema({**_TEXT, "examples": ["redis://localhost:6379/0"]})
]
_NODE_LIST_SCHEMA = WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]})
NodeNames = Annotated[tuple[Name, ...], BeforeValidator(_as_tuple), _NODE_LIST_SCHEMA]
Models = Annotated[tuple[Line, ...], BeforeValidator(_as_tuple), _list_schema(_TEXT, minItems=1)]
ContextStep = Annotated[int, _integer_between(1, 1 << 31), _integer_schema(1, 1 << 31)]
ContextSteps = Annotated[
    tuple[ContextStep, ...],
    BeforeValidator(_as_tuple),
    WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1}),
]
Sha256 = Annotated[
    str, _parse_with(value_parsers.parse_sha256), WithJsonSchema({**_TEXT, "pattern": value_parsers.SHA256_PATTERN})
]
Origin = Annotated[str, _parse_with(value_parsers.parse_origin)]
Origins = Annotated[tuple[Origin, ...], BeforeValidator(_as_tuple), _list_schema(_TEXT)]


class Section(BaseModel):
    """A mapping of mesh.yaml. Unknown keys are errors, and the text of an error never contains the input."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Ssh(Section):
    """How to reach the host by SSH. A node without `ssh` is reached directly."""

    host: Host | None = Field(default=None, description="Name or address of the host.")
    port: Port | None = Field(default=None, description="The SSH port; 22 if not given.")
    user: User | None = Field(
        default=None, description="The user to log in as; your own name if not given, as with ssh."
    )
    identity_file: FilePaths | None = Field(
        default=None,
        description="Private key file, or a list of them to try in order. A .pub: its key is in the agent.",
    )
    known_hosts: FilePath | None = Field(
        default=None, description="File of known host keys; ~/.ssh/known_hosts if not given."
    )
    host_key_policy: HostKeyPolicy | None = Field(
        default=None, description="strict (default): an unknown host key is refused. accept-new: it is recorded."
    )
    proxy_jump: Jumps | None = Field(
        default=None, description="[user@]host[:port] to go through; a list or a,b for a chain."
    )
    password_env: Variable | None = Field(default=None, description="Name of the variable that holds the password.")
    passphrase_env: Variable | None = Field(default=None, description="Name of the variable with the key's passphrase.")
    agent: bool | None = Field(default=None, description="Whether keys of the SSH agent are tried; true if not given.")
    identities_only: bool | None = Field(
        default=None,
        description="Of the agent's keys, only those of `identity_file` are tried; false if not given.",
    )
    alias: Alias | None = Field(
        default=None, description="A Host of ~/.ssh/config: its settings hold where this file is silent."
    )
    transport: TransportKind | None = Field(
        default=None, description="sshtunnel (default), or openssh: the system's ssh, for what only it can do."
    )
    connect_timeout: Interval | None = Field(default=None, description="Time for one attempt; 6s if not given.")
    keepalive: Interval | None = Field(
        default=None, description="How often the host is asked for a sign of life; 2s if not given."
    )


class Backend(Section):
    """The inference server of a node. One of `port`, `url` and `urls` says where it is."""

    kind: BackendKind | None = Field(
        default=None,
        description="auto (default): found by asking; ollama, llamacpp, vllm, or openai: any other with its API.",
    )
    port: Port | None = Field(
        default=None,
        description="Its port on 127.0.0.1 of the SSH host; its kind's usual one, 11434 for auto, if not given.",
    )
    url: Url | None = Field(
        default=None, description="Where it is, as seen from the SSH host, or from here without ssh."
    )
    urls: Urls | None = Field(default=None, description="Candidates: the first that answers is used.")
    api_key_env: Variable | None = Field(
        default=None, description="Name of the variable that holds the server's API key."
    )
    max_parallel: Annotated[int, _integer_between(1, 4096), _integer_schema(1, 4096)] | None = Field(
        default=None, description="How many requests it runs at once; learned if not given."
    )


class Expect(Section):
    """What you believe to be there; `gpumesh audit` compares."""

    hostname: Line | None = Field(default=None, description="What `hostname` prints there.")
    gpus: Annotated[int, _integer_between(0, 1024), _integer_schema(0, 1024)] | None = Field(
        default=None, description="Number of GPUs."
    )
    gpu: Line | None = Field(default=None, description="The GPU's name, as nvidia-smi prints it.")
    vram_mib: Annotated[int, _integer_between(1, 1 << 30), _integer_schema(1, 1 << 30)] | None = Field(
        default=None, description="Memory of one GPU in MiB."
    )
    driver: Line | None = Field(default=None, description="The driver's version, or how it begins.")
    models: LineList | None = Field(default=None, description="Models that must be there.")


class AddressFrom(Section):
    """Where the host is today, for addresses that change (RunPod, vast.ai)."""

    command: Command = Field(description="Run without a shell; prints `host port`, or JSON with both.")
    timeout: Interval | None = Field(default=None, description="Time for the command; 20s if not given.")


class NodeDefaults(Section):
    """Merged under every node. `ssh` only under those that have an `ssh` of their own."""

    ssh: Ssh | None = None
    backend: Backend | None = None
    expect: Expect | None = None
    weight: (
        Annotated[
            float,
            _parse_with(value_parsers.parse_weight),
            WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 1000}),
        ]
        | None
    ) = Field(default=None, description="Share of the work relative to other nodes; 1 if not given.")
    tier: Annotated[int, _integer_between(1, 1000), _integer_schema(1, 1000)] | None = Field(
        default=None,
        description="1 if not given. A node of a higher tier is used only when the lower ones are full, away or much "
        "slower.",
    )
    labels: dict[Name, Line] | None = Field(default=None, description="Words of your own, shown by `status --json`.")
    enabled: bool | None = Field(default=None, description="false: the node stays in the file and is left alone.")


class Node(NodeDefaults):
    """One host with one inference server."""

    name: Name = Field(description="Letters, digits, dots, hyphens, underscores.")
    address_from: AddressFrom | None = None


class ApiKey(Section):
    """An API key of one user or program. Either `env` or `hash` says which key it is."""

    name: Name = Field(description="Who holds the key: shown in tables, and the client whose share is counted.")
    env: Variable | None = Field(default=None, description="Name of the variable that holds the key.")
    hash: Sha256 | None = Field(default=None, description="The key's SHA-256 in hexadecimal, in place of `env`.")
    priority: Priority | None = Field(
        default=None, description="Of requests that ask for none: interactive, normal or batch."
    )
    nodes: NodeNames | None = Field(default=None, description="The only nodes that it may use; all if not given.")
    models: Models | None = Field(default=None, description="The only models that it may use; all if not given.")


class Gateway(Section):
    """The one endpoint that clients use."""

    listen: Listen | None = Field(
        default=None,
        description="HOST:PORT, unix:PATH, or a list of one of each; 127.0.0.1:11430 if not given. Port 0 is any free "
        "one. A Unix socket is for your own user (0600).",
    )
    api_key_env: Variable | None = Field(
        default=None, description="Name of the variable with the key that clients must send; needed beyond loopback."
    )
    keys: tuple[ApiKey, ...] | None = Field(
        default=None, description="Keys of single users and programs, each with what it may use."
    )
    route_priority: dict[str, Priority] | None = Field(
        default=None, description="The class of requests to a route that ask for none, such as `/api/embed: batch`."
    )
    default_model: Line | None = Field(default=None, description="Used where a command is given no model.")
    policy: PolicyKind | None = Field(default=None, description="How a node is chosen; adaptive if not given.")
    max_queue: Annotated[int, _integer_between(0, 1_000_000), _integer_schema(0, 1_000_000)] | None = Field(
        default=None, description="How many requests may wait; 1024 if not given. Past it clients get 503."
    )
    body_memory_mib: Annotated[int, _integer_between(16, 1 << 20), _integer_schema(16, 1 << 20)] | None = Field(
        default=None, description="Memory for the bodies of all requests together; 512 if not given. Past it 503."
    )
    timeout: LongWait | None = Field(default=None, description="For one request as a whole; 10m if not given.")
    cors_origins: Origins | None = Field(
        default=None, description="Web pages that may use the gateway, by their origin."
    )
    access_log: bool | None = Field(
        default=None,
        description="Whether a line is kept for each request, without its prompt; true if not given.",
    )


class Tunnels(Section):
    """The local ends of the SSH tunnels, which other programs may use."""

    share: bool | None = Field(
        default=None,
        description="true: all users of this machine may connect to the forwarded ports; if not given, only your own "
        "user and root (on Linux; elsewhere the system does not tell).",
    )
    listen: TunnelListen | None = Field(
        default=None,
        description="tcp (default): a port on 127.0.0.1 for each node. unix: a Unix socket in the runtime folder, for "
        "your own user.",
    )


class Model(Section):
    """What holds for one model, whatever node has it."""

    nodes: NodeNames | None = Field(
        default=None,
        description="The only nodes that serve it, each of which should have it in memory; `all` for every node. Any "
        "node that has the model if not given.",
    )
    prefer: NodeNames | None = Field(default=None, description="Nodes that serve it first, as those of a lower tier.")
    copies: Annotated[int, _integer_between(1, 4096), _integer_schema(1, 4096)] | None = Field(
        default=None,
        description="On how many of its nodes it should be in memory; on all of `nodes`, or else as its demand "
        "requires, if not given.",
    )
    pinned: bool | None = Field(
        default=None, description="true: no other model pushes those copies out. false if not given."
    )
    context_steps: ContextSteps | None = Field(
        default=None,
        description="Contexts in tokens, rising: what a client asks for (`num_ctx`) is rounded up to one of them.",
    )
    aliases: Models | None = Field(
        default=None, description="Other names of the same model, which clients may use and servers may list."
    )
    fallback: Line | None = Field(default=None, description="The model that serves a request if no node can with this.")


class Redis(Section):
    """Optional: several gateways share what they have in flight."""

    url: RedisUrl = Field(description="redis://, rediss:// or unix://, without a password.")
    password_env: Variable | None = Field(default=None, description="Name of the variable that holds Redis's password.")


class MeshFile(Section):
    """A mesh: GPUs behind SSH as one endpoint."""

    version: Annotated[int, _integer_between(1, 1), _integer_schema(1, 1)] | None = Field(
        default=None, description="Of this format: 1."
    )
    name: Name | None = Field(default=None, description="Of the mesh; `mesh` if not given.")
    gateway: Gateway | None = None
    tunnels: Tunnels | None = None
    defaults: NodeDefaults | None = None
    nodes: tuple[Node, ...] = Field(description="The hosts, at least one.")
    redis: Redis | None = None
    models: dict[Line, Model | None] | None = Field(
        default=None, description="Rules for single models, by their names."
    )


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of mesh.yaml."""
    document = MeshFile.model_json_schema()
    return {"$schema": SCHEMA_ID, **document, "title": "gpumesh mesh.yaml"}
