"""The schema of mesh.yaml: the keys of each section, and the values that each key accepts.

``rules`` has the rules between keys. Almost all keys are optional, because a node's value may come from ``defaults``;
``None`` means that the file does not give the key. Descriptions go into the JSON Schema (json_schema.py) and the docs.
"""

from __future__ import annotations

from gpumesh.config.mesh_file.setting_values import (
    ALIAS,
    ANY_TEXT,
    BOOLEAN,
    COMMAND,
    CONTEXT_STEPS,
    EVENTS,
    HEARTBEAT,
    HOST,
    HOST_FOLDER,
    HOURLY_PRICE,
    INTERVAL,
    JUMPS,
    LINE,
    LINES,
    LISTEN,
    LONG_WAIT,
    MODELS,
    NAME,
    NODE_NAMES,
    ORIGINS,
    PATH,
    PATHS,
    POOL_MODEL,
    PORT,
    QUIET,
    RATE,
    REDIS_URL,
    SHA256,
    SIZE,
    SPLIT,
    TOKENS,
    URL,
    URLS,
    USER,
    VARIABLE,
    WEBHOOK,
    WEIGHT,
)
from gpumesh.config.mesh_file.value_types import (
    Choice,
    ListOf,
    MappingOf,
    Nullable,
    Section,
    SectionOf,
    SectionOrText,
    integer,
    list_of_sections,
    optional,
    required,
)
from gpumesh.pool_spec import KvType
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
    """Optional: several gateways share the nodes of the mesh."""

    url: str = required(
        REDIS_URL,
        "redis://HOST:PORT/DB, rediss:// (with TLS), unix:///SOCKET, or "
        "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB, without a password.",
    )
    password_env: str | None = optional(VARIABLE, "Name of the variable that holds Redis's password.")
    ca_file: str | None = optional(
        PATH, "The certificates that may sign the server's, with TLS; those of the system if not given."
    )
    sentinel_password_env: str | None = optional(
        VARIABLE, "Name of the variable that holds the password of the Sentinels, if they ask for one."
    )


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


class PoolNode(Section):
    """A node of a pool."""

    node: str = required(NAME, "Its name under `nodes`.")
    memory: int | None = optional(
        SIZE,
        "The pool takes at most so much of its memory, such as 20GiB; what is free on its GPUs if not given. A node "
        "without a GPU takes part with its CPU, and only with this.",
    )


_POOL_NODE = SectionOrText(PoolNode, "node")


class Pool(Section):
    """One model over the GPUs of several nodes, by llama.cpp's RPC."""

    name: str = required(NAME, "Of the pool, and of its node in `gpumesh status`; no node may have it.")
    model: str = required(
        POOL_MODEL, "A model of the Ollama on the head's host, or the path of a GGUF file there, from / or ~/."
    )
    nodes: tuple[PoolNode, ...] = required(
        ListOf(_POOL_NODE, {"type": "array", "items": _POOL_NODE.schema, "minItems": 1}),
        "The nodes that hold its layers: names, or `{node, memory}`.",
    )
    head: str | None = optional(
        NAME, "The one of them that runs llama-server and has the model's file; the first if not given."
    )
    context: int | None = optional(integer(128, 1 << 24), "Tokens of each stream; 4096 if not given.")
    parallel: int | None = optional(integer(1, 256), "How many streams are decoded together; 1 if not given.")
    kv_type: KvType | None = optional(
        Choice(KvType), "Of the numbers in the KV cache: f16 (default), q8_0 (half the memory) or q4_0 (a quarter)."
    )
    split: tuple[int, ...] | None = optional(
        SPLIT, "Number of layers for each of `nodes`, in their order; as planned if not given."
    )
    draft: str | None = optional(
        POOL_MODEL,
        "A small model of the same kind, in the same form as `model`, that proposes tokens; or `ngram`: the tokens "
        "that followed the same text before.",
    )
    llama_cpp_dir: str | None = optional(
        HOST_FOLDER, "The folder with llama.cpp's programs on the hosts; looked for if not given."
    )
    unload: bool | None = optional(
        BOOLEAN, "true: Ollama on its hosts may be asked to unload models if the pool needs their memory."
    )
    autostart: bool | None = optional(BOOLEAN, "true: starts with the mesh; false, at `gpumesh pool up`, if not given.")


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
    pools: tuple[Pool, ...] | None = optional(
        list_of_sections(Pool), "Models that several nodes run together: `gpumesh pool up`."
    )
