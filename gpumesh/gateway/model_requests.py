"""What a client asks for: the routes of models, and the ``Demand`` read from route, headers and body. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from gpumesh.backends import safe_json
from gpumesh.backends.dialects import kinds_that_serve
from gpumesh.balancer.base import Demand, Priority
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.json_members import Members, RawValue
from gpumesh.topology import BackendKind, Topology

MAX_OPTIONS_BYTES = 64 << 10  # a dozen numbers and a few stop words
MAX_NUMBER_BYTES = 32
MIN_PROMPT_BYTES = 2000  # of a body; a shorter one is read in no time
BYTES_PER_TOKEN = 4
MAX_TIMEOUT_S = 86400.0
OLLAMA_ONLY = kinds_that_serve("/api/chat")
ALL_KINDS = kinds_that_serve("/v1/chat/completions")


class ClientApi(StrEnum):
    """The API that a client uses: its error shapes and stream frames."""

    OLLAMA = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """``needs_slot``: it costs inference, so it takes a slot on its node. ``model_keys``: the members that may name the
    model, in order; the first that is there does (``server/routes.go`` of Ollama)."""

    methods: frozenset[str]
    api: ClientApi = ClientApi.OLLAMA
    kinds: frozenset[BackendKind] = OLLAMA_ONLY
    needs_slot: bool = True
    model_keys: tuple[str, ...] = ("model",)


_POST = frozenset({"POST"})

# Routes that go to one node which has the model. All other routes are in routing.py.
MODEL_ROUTES: Mapping[str, ModelRoute] = {
    "/api/chat": ModelRoute(_POST),
    "/api/generate": ModelRoute(_POST),
    "/api/embed": ModelRoute(_POST),
    "/api/embeddings": ModelRoute(_POST),
    "/api/show": ModelRoute(_POST, needs_slot=False, model_keys=("model", "name")),
    "/v1/chat/completions": ModelRoute(_POST, ClientApi.OPENAI, ALL_KINDS),
    "/v1/completions": ModelRoute(_POST, ClientApi.OPENAI, ALL_KINDS),
    "/v1/embeddings": ModelRoute(_POST, ClientApi.OPENAI, ALL_KINDS),
    "/v1/responses": ModelRoute(_POST, ClientApi.OPENAI, ALL_KINDS),
    "/v1/messages": ModelRoute(_POST, ClientApi.ANTHROPIC, ALL_KINDS),
    "/v1/audio/transcriptions": ModelRoute(_POST, ClientApi.OPENAI, ALL_KINDS),
}


def find_client_api(path: str) -> ClientApi:
    """The API of a client that asks for this path, whether or not it is served."""
    route = MODEL_ROUTES.get(path)
    if route is not None:
        return route.api
    return ClientApi.OPENAI if path.startswith("/v1/") else ClientApi.OLLAMA


def read_demand(
    route: ModelRoute,
    headers: Mapping[str, str],
    members: Members,
    *,
    size: int,
    model: str | None,
    node: str | None = None,
    request_id: str | None = None,
) -> Demand:
    """``members`` are those of the body, which has ``size`` bytes. ``model`` comes from ``read_model``, or is the
    default model. ``node`` comes from ``read_node``.

    Raises BadRequest for what no server could answer.
    """
    if model is None or not model.strip():
        raise BadRequest("model is required")
    written = members.known.get("options")
    options = _NO_OPTIONS if written is None else _read_options(written)
    return Demand(
        model=model,
        kinds=route.kinds,
        node=node,
        priority=read_priority(headers),
        session=headers.get("X-GPUMesh-Session"),
        prompt_tokens=size // BYTES_PER_TOKEN if size > MIN_PROMPT_BYTES else None,
        max_tokens=_read_max_tokens(members, options),
        needs_slot=route.needs_slot,
        id=request_id,
    )


def read_model(route: ModelRoute, members: Members) -> str | None:
    """The model that the client names; ``None`` where it names none. Raises BadRequest."""
    for name in route.model_keys:
        model = members.text(name)
        if model:
            return model
    return None


class _Options(msgspec.Struct, gc=False):
    """What is read of ``options``. As in Go's maps the last of two counts, and only this spelling."""

    num_predict: Any = None


_NO_OPTIONS = _Options()
_decode_options = msgspec.json.Decoder(_Options).decode


def _read_options(value: RawValue) -> _Options:
    """No options where they cannot be read: the server will say what is wrong with them."""
    try:
        return _NO_OPTIONS if len(value) > MAX_OPTIONS_BYTES else _decode_options(value)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return _NO_OPTIONS


def read_node(headers: Mapping[str, str], topology: Topology) -> str | None:
    """The node that the client names; ``None`` where it names none. Raises BadRequest when there is no such node."""
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
    """Seconds. A client may shorten the gateway's own deadline, or lengthen it up to a day."""
    asked = headers.get("X-GPUMesh-Timeout")
    if asked is None:
        return default_s
    try:
        seconds = float(asked.strip().removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= MAX_TIMEOUT_S:
        raise BadRequest(f"X-GPUMesh-Timeout is a number of seconds, not {asked!r}")
    return seconds


def _read_max_tokens(members: Members, options: _Options) -> int | None:
    """How many tokens the answer may have; ``None`` where the client sets no limit."""
    values = [options.num_predict]
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        written = members.known.get(name)
        if written is not None and len(written) <= MAX_NUMBER_BYTES:
            try:
                values.append(msgspec.json.decode(written))
            except (msgspec.MsgspecError, ValueError):
                continue
    for value in values:
        count = safe_json.as_count(value)
        if count:
            return count
    return None
