"""A probe against one server, and what servers of the tests read and write."""

from __future__ import annotations

import json
from typing import Any

import httpx

from gpumesh.probes.backend import BackendReport, probe_backend
from gpumesh.topology import BackendKind, BackendSpec, Target
from tests.mesh.servers import Exchange, whole_response

PATIENCE_S = 20.0
OLLAMA = BackendSpec(BackendKind.OLLAMA, targets=(Target("127.0.0.1", 11434),))
OPENAI = BackendSpec(kind=BackendKind.OPENAI, targets=(Target("127.0.0.1", 8080),))


async def probe(
    client: httpx.AsyncClient,
    *urls: str,
    spec: BackendSpec = OLLAMA,
    key: str | None = None,
    timeout_s: float = PATIENCE_S,
) -> BackendReport:
    return await probe_backend(client, spec, urls, api_key=key, timeout_s=timeout_s, node="iceland")


def request_path(exchange: Exchange) -> str:
    return exchange.head.split(b" ")[1].decode()


def request_header(exchange: Exchange, name: str) -> str | None:
    for line in exchange.head.decode().split("\r\n")[1:]:
        key, _, value = line.partition(": ")
        if key.lower() == name.lower():
            return value
    return None


def json_response(document: Any) -> bytes:
    return whole_response(json.dumps(document).encode())
