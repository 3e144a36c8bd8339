"""What a client asks for, read from its route, headers and body. Pure: bytes in, a Demand or a refusal out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gpumesh.balancer.base import Demand, Priority
from gpumesh.errors import GPUMeshError
from gpumesh.topology import BackendKind, Topology

OLLAMA_ONLY = frozenset({BackendKind.OLLAMA})
EITHER = frozenset(BackendKind)


class Shape(StrEnum):
    """Whose error shapes and stream frames a route uses."""

    NATIVE = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Route:
    """``place``: it costs inference, so it takes a place on its node."""

    methods: frozenset[str]
    shape: Shape = Shape.NATIVE
    kinds: frozenset[BackendKind] = OLLAMA_ONLY
    place: bool = True


_POST = frozenset({"POST"})

# Routes that go to one node which has the model; what concerns the whole fleet is in app.py.
MODEL_ROUTES: Mapping[str, Route] = {
    "/api/chat": Route(_POST),
    "/api/generate": Route(_POST),
    "/api/embed": Route(_POST),
    "/api/embeddings": Route(_POST),
    "/api/show": Route(_POST, place=False),
    "/v1/chat/completions": Route(_POST, Shape.OPENAI, EITHER),
    "/v1/completions": Route(_POST, Shape.OPENAI, EITHER),
    "/v1/embeddings": Route(_POST, Shape.OPENAI, EITHER),
    "/v1/responses": Route(_POST, Shape.OPENAI, EITHER),
    "/v1/messages": Route(_POST, Shape.ANTHROPIC, EITHER),
    "/v1/audio/transcriptions": Route(_POST, Shape.OPENAI, EITHER),
}


class BadRequest(GPUMeshError):
    """The client's own mistake, told in its dialect with this status."""

    code = "bad-request"

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def shape_of(path: str) -> Shape:
    route = MODEL_ROUTES.get(path)
    if route is not None:
        return route.shape
    return Shape.OPENAI if path.startswith("/v1/") else Shape.NATIVE


def read_demand(
    route: Route,
    headers: Mapping[str, str],
    document: Mapping[str, Any],
    *,
    size: int,
    default_model: str | None,
    node: str | None = None,
    request_id: str | None = None,
) -> Demand:
    """``document`` is the body, of ``size`` bytes; ``node`` comes from ``read_node``.

    Raises BadRequest for what no server could answer.
    """
    model = document.get("model") or document.get("name") or default_model
    if not isinstance(model, str) or not model.strip():
        raise BadRequest("model is required")
    options = document.get("options")
    options = options if isinstance(options, dict) else {}
    context = options.get("num_ctx")
    return Demand(
        model=model,
        kinds=route.kinds,
        node=node,
        priority=read_priority(headers),
        session=headers.get("X-GPUMesh-Session"),
        affinity=f"{model}/{context}" if context is not None else None,
        prompt_tokens=size // 4 if size > 2000 else None,
        max_tokens=_max_tokens(document, options),
        place=route.place,
        id=request_id,
    )


def names_model(document: Mapping[str, Any]) -> bool:
    """Whether the client itself says which model it wants."""
    return bool(document.get("model") or document.get("name"))


def read_object(body: bytes) -> dict[str, Any]:
    """Raises BadRequest in Ollama's own words."""
    if not body:
        raise BadRequest("missing request body")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadRequest("the request body is not a JSON object")
    return document


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


def _max_tokens(document: Mapping[str, Any], options: Mapping[str, Any]) -> int | None:
    for value in (options.get("num_predict"), document.get("max_completion_tokens"), document.get("max_tokens")):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
