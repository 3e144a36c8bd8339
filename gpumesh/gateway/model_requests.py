"""What a client asks for, read from its route, headers and body. Pure: bytes in, a Demand or a refusal out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgspec

from gpumesh.backends import safe_json
from gpumesh.backends.dialects import kinds_that_serve
from gpumesh.balancer.base import Demand, Priority
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.topology import BackendKind, Topology

if TYPE_CHECKING:
    from gpumesh.gateway.json_members import Members, RawValue

OPTIONS_BYTES = 64 << 10  # a dozen numbers and a few stop words
NUMBER_BYTES = 32
OLLAMA_ONLY = kinds_that_serve("/api/chat")
ALL_KINDS = kinds_that_serve("/v1/chat/completions")


class ClientApi(StrEnum):
    """Whose error shapes and stream frames a route uses."""

    OLLAMA = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Route:
    """``needs_slot``: it costs inference, so it takes a place on its node. ``model_keys``: the members that may name
    the model; the first that does (server/routes.go of Ollama)."""

    methods: frozenset[str]
    api: ClientApi = ClientApi.OLLAMA
    kinds: frozenset[BackendKind] = OLLAMA_ONLY
    needs_slot: bool = True
    model_keys: tuple[str, ...] = ("model",)


_POST = frozenset({"POST"})

# Routes that go to one node which has the model; what concerns the whole fleet is in app.py.
MODEL_ROUTES: Mapping[str, Route] = {
    "/api/chat": Route(_POST),
    "/api/generate": Route(_POST),
    "/api/embed": Route(_POST),
    "/api/embeddings": Route(_POST),
    "/api/show": Route(_POST, needs_slot=False, model_keys=("model", "name")),
    "/v1/chat/completions": Route(_POST, ClientApi.OPENAI, ALL_KINDS),
    "/v1/completions": Route(_POST, ClientApi.OPENAI, ALL_KINDS),
    "/v1/embeddings": Route(_POST, ClientApi.OPENAI, ALL_KINDS),
    "/v1/responses": Route(_POST, ClientApi.OPENAI, ALL_KINDS),
    "/v1/messages": Route(_POST, ClientApi.ANTHROPIC, ALL_KINDS),
    "/v1/audio/transcriptions": Route(_POST, ClientApi.OPENAI, ALL_KINDS),
}


def find_client_api(path: str) -> ClientApi:
    route = MODEL_ROUTES.get(path)
    if route is not None:
        return route.api
    return ClientApi.OPENAI if path.startswith("/v1/") else ClientApi.OLLAMA


def read_demand(
    route: Route,
    headers: Mapping[str, str],
    members: Members,
    *,
    size: int,
    model: str | None,
    node: str | None = None,
    request_id: str | None = None,
) -> Demand:
    """``members`` are the body's, which is of ``size`` bytes; ``model`` comes from ``read_model``, or is the default
    one; ``node`` comes from ``read_node``.

    Raises BadRequest for what no server could answer.
    """
    if model is None or not model.strip():
        raise BadRequest("model is required")
    given = members.known.get("options")
    options = _NO_OPTIONS if given is None else _options(given)
    return Demand(
        model=model,
        kinds=route.kinds,
        node=node,
        priority=read_priority(headers),
        session=headers.get("X-GPUMesh-Session"),
        prompt_tokens=size // 4 if size > 2000 else None,
        max_tokens=_max_tokens(members, options),
        needs_slot=route.needs_slot,
        id=request_id,
    )


def read_model(route: Route, members: Members) -> str | None:
    """What the client itself says which model it wants. Raises BadRequest."""
    for name in route.model_keys:
        model = members.text(name)
        if model:
            return model
    return None


class _Options(msgspec.Struct, gc=False):
    """What is read of ``options``: as with Go's maps, the last of two, and in this very spelling."""

    num_predict: Any = None


_NO_OPTIONS = _Options()
_decode_options = msgspec.json.Decoder(_Options).decode


def _options(value: RawValue) -> _Options:
    """Nothing is known of what cannot be read: a server will say what is wrong with it."""
    try:
        return _NO_OPTIONS if len(value) > OPTIONS_BYTES else _decode_options(value)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return _NO_OPTIONS


def read_node(headers: Mapping[str, str], topology: Topology) -> str | None:
    """The one node that the client wants. Raises BadRequest when there is no such node."""
    name = headers.get("X-GPUMesh-Node")
    if name is None:
        return None
    names = [node.name for node in topology.nodes]
    if name not in names:
        raise BadRequest(f"X-GPUMesh-Node names no node of this mesh; the nodes are: {', '.join(names)}")
    return name


def read_priority(headers: Mapping[str, str]) -> Priority:
    asked = headers.get("X-GPUMesh-Priority")
    if asked is None:
        return Priority.NORMAL
    try:
        return Priority(asked.strip().lower())
    except ValueError:
        raise BadRequest(f"X-GPUMesh-Priority is one of {', '.join(Priority)}, not {asked!r}") from None


def read_timeout(headers: Mapping[str, str], default_s: float) -> float:
    """Seconds; a client may shorten the gateway's own deadline or lengthen it up to a day."""
    asked = headers.get("X-GPUMesh-Timeout")
    if asked is None:
        return default_s
    try:
        seconds = float(asked.strip().removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= 86400.0:
        raise BadRequest(f"X-GPUMesh-Timeout is a number of seconds, not {asked!r}")
    return seconds


def _max_tokens(members: Members, options: _Options) -> int | None:
    values = [options.num_predict]
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        given = members.known.get(name)
        if given is not None and len(given) <= NUMBER_BYTES:
            try:
                values.append(msgspec.json.decode(given))
            except (msgspec.MsgspecError, ValueError):
                continue
    for value in values:
        count = safe_json.as_count(value)
        if count:
            return count
    return None
