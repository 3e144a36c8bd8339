"""The routes that need a model, and the reading of a request's ``Demand`` from its route, headers and body. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

import msgspec

from gpumesh.backends import safe_json
from gpumesh.backends.continuation.stream_formats import generates_text
from gpumesh.backends.dialects import kinds_that_serve
from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.models.load_options import LoadOptions, plain_residency_key
from gpumesh.balancer.prefixes.cache_size import BYTES_PER_TOKEN
from gpumesh.gateway.body_parsers.json_members import Members, RawValue
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.topology import BackendKind, Topology

MAX_OPTIONS_BYTES = 64 << 10  # plenty for a dozen numbers and a few stop words
MAX_NUMBER_BYTES = 32  # a limit of tokens that is written with more bytes is no sensible number, and is ignored
_MAX_BOOLEAN_BYTES = 5
MIN_PROMPT_BYTES = 2000  # of a smaller body, the time to read the prompt does not matter to the balancer
MAX_TIMEOUT_S = 86400.0  # a day
OLLAMA_ONLY = kinds_that_serve("/api/chat")
ALL_KINDS = kinds_that_serve("/v1/chat/completions")


class ClientApi(StrEnum):
    """The API that a client uses: its error shapes and stream frames."""

    OLLAMA = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """A route whose requests go to a node that has the model.

    ``kinds`` are the kinds of server that serve it. ``needs_slot``: the request needs inference, so it takes a slot on
    its node. ``model_keys``: the members that may name the model; the first of them that is not empty is used (as in
    ``server/routes.go`` of Ollama). ``prompt_members``: the members that are the prompt, in the order in which servers
    render them; none if no server keeps prompts of this route in its cache. ``is_known`` is false for a route of which
    nothing is known but its path (``find_model_route``)."""

    methods: frozenset[str]
    api: ClientApi = ClientApi.OLLAMA
    kinds: frozenset[BackendKind] = OLLAMA_ONLY
    needs_slot: bool = True
    model_keys: tuple[str, ...] = ("model",)
    prompt_members: tuple[str, ...] = ()
    is_known: bool = True


_POST = frozenset({"POST"})
_GET = frozenset({"GET"})

# Routes of which more is known than their path. All other routes are in routing.py, or go by ``find_model_route``.
MODEL_ROUTES: Mapping[str, ModelRoute] = {
    "/api/chat": ModelRoute(_POST, prompt_members=("tools", "messages")),
    # ``context`` holds the tokens of the conversation so far. Images are rendered before the prompt.
    "/api/generate": ModelRoute(_POST, prompt_members=("context", "system", "images", "prompt")),
    "/api/embed": ModelRoute(_POST),
    "/api/embeddings": ModelRoute(_POST),
    "/api/show": ModelRoute(_POST, needs_slot=False, model_keys=("model", "name")),
    "/v1/chat/completions": ModelRoute(
        _POST, ClientApi.OPENAI, ALL_KINDS, prompt_members=("tools", "functions", "messages")
    ),
    "/v1/completions": ModelRoute(_POST, ClientApi.OPENAI, ALL_KINDS, prompt_members=("prompt",)),
    "/v1/embeddings": ModelRoute(_POST, ClientApi.OPENAI, ALL_KINDS),
    "/v1/responses": ModelRoute(_POST, ClientApi.OPENAI, ALL_KINDS, prompt_members=("instructions", "tools", "input")),
    "/v1/messages": ModelRoute(_POST, ClientApi.ANTHROPIC, ALL_KINDS, prompt_members=("system", "tools", "messages")),
    "/v1/audio/transcriptions": ModelRoute(_POST, ClientApi.OPENAI, ALL_KINDS),
}


OTHER_ROUTE = "other"  # the name of all routes that are not known, in metrics and for what is learned of routes
_OWN_PATHS = ("/", "/healthz", "/metrics", "/ui")
# A plain path: servers and the proxies before them agree what it means. No "..", no empty part, nothing encoded.
_PLAIN_PATH = re.compile(r"(?:/[A-Za-z0-9_][A-Za-z0-9._:@-]{0,99}){1,10}")
# What servers tell of a model to a GET. Under other paths they tell of their other clients (``/slots``).
_GET_PREFIXES = ("/v1/", "/api/")
# The last part of the path of a route that counts or renders tokens, which costs no inference.
_WITHOUT_SLOT = frozenset({"tokenize", "detokenize", "count_tokens", "input_tokens", "apply-template"})


def find_model_route(method: str, target: str) -> ModelRoute | None:
    """The route of a request that no table has: servers have many (``/v1/rerank``, ``/tokenize`` …), and more with
    each version. A POST goes to a node that has the model that its body or its query names, a GET to one that has the
    model in its query. ``None`` if the path is one of the gateway's own, or not plain. ``target``: the path and the
    query as they came."""
    path, _, query = target.partition("?")
    if _is_own_path(path) or _PLAIN_PATH.fullmatch(path) is None:
        return None
    if method == "GET" and "model=" in query and path.startswith(_GET_PREFIXES):
        return replace(_make_route(path), methods=_GET, needs_slot=False)
    return _make_route(path) if method == "POST" else None


@lru_cache(maxsize=256)
def _make_route(path: str) -> ModelRoute:
    needs_slot = path.rpartition("/")[2] not in _WITHOUT_SLOT
    return ModelRoute(_POST, find_client_api(path), kinds_that_serve(path), needs_slot, is_known=False)


# The last part of the path of a route that uses a model and changes nothing on the server.
_INFERENCE = _WITHOUT_SLOT | {
    "rerank",
    "score",
    "classify",
    "pooling",
    "similarity",
    "moderations",
    "embeddings",
    "embedding",
    "embed",
    "completions",
    "completion",
    "infill",
    "generations",
    "edits",
    "variations",
    "translations",
    "transcriptions",
    "speech",
}


def only_uses_model(route: ModelRoute, path: str) -> bool:
    """Whether a request to this route only uses its model: then a key that is limited to this model may make it. What
    other routes do that are not known, such as those that load a model, is not known either."""
    return route.is_known or ("POST" in route.methods and path.rpartition("/")[2] in _INFERENCE)


def _is_own_path(path: str) -> bool:
    return path in _OWN_PATHS or path.startswith("/mesh/")


def find_client_api(path: str) -> ClientApi:
    """The API that a client of this path uses, even if the path is not served."""
    route = MODEL_ROUTES.get(path)
    if route is not None:
        return route.api
    if path.startswith("/v1/messages/"):
        return ClientApi.ANTHROPIC
    return ClientApi.OLLAMA if path.startswith("/api/") or _is_own_path(path) else ClientApi.OPENAI


def read_demand(
    route: ModelRoute,
    headers: Mapping[str, str],
    members: Members,
    *,
    size: int,
    model: str | None,
    node: str | None = None,
    request_id: str | None = None,
    path: str = "",
    client: str = "",
    default_priority: Priority = Priority.NORMAL,
    nodes: frozenset[str] | None = None,
) -> Demand:
    """Returns the demand of a request: its model, node, priority, and about how many tokens it will take.

    ``members`` are the members of the body, which has ``size`` bytes. ``model`` comes from ``read_model``, or is the
    default model. ``node`` comes from ``read_node``. The length of a short prompt stays unknown (``MIN_PROMPT_BYTES``).
    ``path`` is the route's path. ``client`` is the client's name (``ClientNames``). ``default_priority`` is the
    priority of a request that asks for none. ``nodes`` are the only nodes that the client may use; ``None``: all.

    Raises BadRequest for a request without a model, or with an unknown priority.
    """
    if model is None or not model.strip():
        raise BadRequest("model is required")
    raw_options = members.known.get("options")
    if raw_options is None:
        options, residency = NO_OPTIONS, plain_residency_key(model)
    else:
        options = read_options(raw_options)
        residency = options.residency_key(model)
    return Demand(
        model=model,
        kinds=route.kinds,
        node=node,
        priority=read_priority(headers, default_priority) if "x-gpumesh-priority" in headers else default_priority,
        session=headers.get("x-gpumesh-session"),
        prompt_tokens=int(size // BYTES_PER_TOKEN) if size > MIN_PROMPT_BYTES else None,
        max_tokens=_read_max_tokens(members, options),
        needs_slot=route.needs_slot,
        id=request_id,
        residency=residency if route.needs_slot else None,
        client=client,
        route=path if route.is_known else OTHER_ROUTE,
        is_known_route=route.is_known,
        nodes=nodes,
        is_whole_text=path in _TEXT_PATHS and not _is_streamed(path, members),
    )


_TEXT_PATHS = frozenset(filter(generates_text, MODEL_ROUTES))


def _is_streamed(path: str, members: Members) -> bool:
    """Whether the client wants a text token by token. Ollama's own routes do so unless the client says no."""
    value = members.known.get("stream")
    if value is None or len(value) > _MAX_BOOLEAN_BYTES:
        return path.startswith("/api/")
    text = bytes(value)
    return text == b"true" or (text == b"null" and path.startswith("/api/"))


def read_model(route: ModelRoute, members: Members) -> str | None:
    """The model that the client names; ``None`` if the client names no model. Raises BadRequest if the name is no text,
    or too long."""
    for key in route.model_keys:
        model = members.text(key)
        if model:
            return model
    return None


NO_OPTIONS = LoadOptions()
_decode_options = msgspec.json.Decoder(LoadOptions).decode


def read_options(value: RawValue) -> LoadOptions:
    """Reads the member ``options``. Returns ``NO_OPTIONS`` if it cannot be read: the server will tell the client what
    is wrong with it."""
    if len(value) > MAX_OPTIONS_BYTES:
        return NO_OPTIONS
    try:
        return _decode_options(value)
    except (ValueError, RecursionError):  # no JSON object, or nested too deeply
        return NO_OPTIONS


def read_node(headers: Mapping[str, str], topology: Topology) -> str | None:
    """The node that the client names; ``None`` if the client names no node. Raises BadRequest if there is no such
    node."""
    name = headers.get("x-gpumesh-node")
    if name is None:
        return None
    names = [node.name for node in topology.nodes]
    if name not in names:
        raise BadRequest(f"X-GPUMesh-Node names no node of this mesh; the nodes are: {', '.join(names)}")
    return name


def read_priority(headers: Mapping[str, str], default: Priority = Priority.NORMAL) -> Priority:
    """The priority that the client asks for, else ``default``. Raises BadRequest for an unknown priority."""
    header = headers.get("x-gpumesh-priority")
    if header is None:
        return default
    try:
        return Priority(header.strip().lower())
    except ValueError:
        raise BadRequest(f"X-GPUMesh-Priority is one of {', '.join(Priority)}, not {header!r}") from None


def read_timeout(headers: Mapping[str, str], default_s: float) -> float:
    """The request's time-out in seconds: the client's, else ``default_s``. A client may shorten the gateway's time-out,
    or lengthen it up to a day. Raises BadRequest for a longer time, for 0 or less, and for text that is no number."""
    header = headers.get("x-gpumesh-timeout")
    if header is None:
        return default_s
    try:
        seconds = float(header.strip().removesuffix("s"))
    except ValueError:
        seconds = 0.0  # refused below
    if 0.0 < seconds <= MAX_TIMEOUT_S:  # false for NaN
        return seconds
    raise BadRequest(f"X-GPUMesh-Timeout is a number of seconds, not {header!r}")


def _read_max_tokens(members: Members, options: LoadOptions) -> int | None:
    """How many tokens the answer may have; ``None`` if the client sets no limit. Ollama's option comes first, then the
    members of OpenAI's and Anthropic's APIs. A value that is no number above 0 is ignored."""
    values = [options.num_predict]
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        raw_value = members.known.get(name)
        if raw_value is not None and len(raw_value) <= MAX_NUMBER_BYTES:
            try:
                values.append(msgspec.json.decode(raw_value))
            except ValueError:  # not JSON: ignored here, and the server will tell the client
                continue
    for value in values:
        count = None if value is None else safe_json.as_count(value)
        if count is not None and count > 0:
            return count
    return None
