"""Asks a model for the vectors of texts, in either API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from gpumesh.errors import BackendStatus
from gpumesh.library.arguments import Steering
from gpumesh.library.gateway_link import GatewayLink, translated_stream_errors
from gpumesh.library.reply import Route, read_count
from gpumesh.library.results import Embeddings


class _Entry(msgspec.Struct, gc=False):
    """A vector in OpenAI's form."""

    embedding: tuple[float, ...]


class _Answer(msgspec.Struct):
    """The members of ``/api/embed`` (``embeddings``) and of ``/v1/embeddings`` (``data``)."""

    embeddings: tuple[tuple[float, ...], ...] = ()
    data: tuple[_Entry, ...] = ()
    prompt_eval_count: Any = None
    usage: Any = None


async def embed_texts(
    link: GatewayLink, route: Route, texts: str | list[str], options: Mapping[str, Any], steering: Steering
) -> Embeddings:
    """Sends the texts to a node, and returns a vector for each. Raises GPUMeshError: BackendStatus if the
    answer has not one vector for each text."""
    body: dict[str, Any] = {"model": route.model, "input": texts}
    if route.is_native and options:
        body["options"] = dict(options)
    path = "/api/embed" if route.is_native else "/v1/embeddings"
    response = await link.send(path, json.dumps(body).encode(), steering.headers(), model=route.model)
    node = response.headers.get("X-GPUMesh-Node")
    try:
        with translated_stream_errors(node):
            data = b"".join([piece async for piece in response.aiter_raw()])
    finally:
        await response.aclose()
    try:
        answer = msgspec.json.decode(data, type=_Answer)
    except (ValueError, RecursionError):
        answer = _Answer()
    vectors = answer.embeddings or tuple(entry.embedding for entry in answer.data)
    if len(vectors) != (1 if isinstance(texts, str) else len(texts)):
        raise BackendStatus("the server's answer has other than one vector for each text", status=200, node=node)
    count = answer.usage.get("prompt_tokens") if isinstance(answer.usage, dict) else answer.prompt_eval_count
    return Embeddings(
        vectors=vectors,
        model=response.headers.get("X-GPUMesh-Model", route.model),
        node=node,
        attempts=read_count(response.headers.get("X-GPUMesh-Attempts")) or 1,
        prompt_tokens=count if isinstance(count, int) else None,
    )
