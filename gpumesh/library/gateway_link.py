"""``GatewayLink``: sends requests to a gateway over HTTP, and raises the gateway's errors as gpumesh's own."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from gpumesh.backends import safe_json
from gpumesh.backends.error_text import error_text
from gpumesh.config.listen_address import UNIX_PREFIX
from gpumesh.errors import (
    BackendStatus,
    DeadlineExceeded,
    GPUMeshError,
    MeshNotRunning,
    ModelMissing,
    NoNodeError,
    QueueFull,
    ServersFailed,
    StreamCut,
    UsageError,
)

CONNECT_TIMEOUT_S = 5.0
MAX_ERROR_BYTES = 64 << 10
_JSON = {"Content-Type": "application/json"}


class GatewayAddress:
    """Where a gateway is: ``http://HOST:PORT`` or ``unix:PATH``, and its key. The key is in no text of the object."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.socket = url.removeprefix(UNIX_PREFIX) if url.startswith(UNIX_PREFIX) else None
        self.base_url = "http://localhost" if self.socket is not None else url
        self.api_key = api_key
        self._url = url

    def __repr__(self) -> str:
        return f"<GatewayAddress {self._url}>"

    def client_settings(self) -> dict[str, Any]:
        """The settings of an ``httpx.AsyncClient`` to this gateway, without its base URL."""
        return {"transport": httpx.AsyncHTTPTransport(**self._transport_settings()), "trust_env": False}

    def sync_client_settings(self) -> dict[str, Any]:
        """The same, of an ``httpx.Client``."""
        return {"transport": httpx.HTTPTransport(**self._transport_settings()), "trust_env": False}

    def _transport_settings(self) -> dict[str, Any]:
        # No certificates: the gateway speaks plain HTTP. Any number of connections: the gateway has the queue.
        return {"uds": self.socket, "verify": False, "trust_env": False, "limits": httpx.Limits(max_connections=None)}

    @property
    def authorization(self) -> Mapping[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}


class GatewayLink:
    """Connections to one gateway, inside ``async with``."""

    def __init__(self, address: GatewayAddress) -> None:
        self.address = address
        # The gateway itself ends what takes too long (X-GPUMesh-Timeout, or gateway.timeout of mesh.yaml).
        self._client = httpx.AsyncClient(
            base_url=address.base_url,
            headers=address.authorization,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            **address.client_settings(),
        )

    def __repr__(self) -> str:
        return f"<GatewayLink {self.address!r}>"

    async def aclose(self) -> None:
        await self._client.aclose()

    async def send(self, path: str, body: bytes, headers: Mapping[str, str], *, model: str | None) -> httpx.Response:
        """Sends a POST, and returns the answer when its head has come. The caller closes it. Raises GPUMeshError for an
        error of the gateway or of the server."""
        request = self._client.build_request("POST", path, content=body, headers={**_JSON, **headers})
        with _translated_errors():
            response = await self._client.send(request, stream=True)
        if response.status_code < 400:
            return response
        try:
            raise read_error(response.status_code, response.headers, await _read_start(response), model=model)
        finally:
            await response.aclose()


@contextmanager
def translated_stream_errors(node: str | None) -> Generator[None]:
    """Translates the errors of the block: raises StreamCut for an answer whose connection ends too early."""
    try:
        yield
    except httpx.HTTPError as error:
        raise StreamCut("the connection to the mesh ended in the midst of the answer", node=node) from error


@contextmanager
def _translated_errors() -> Generator[None]:
    """Translates the errors of the block: raises MeshNotRunning if the gateway cannot be reached."""
    try:
        yield
    except httpx.HTTPError as error:
        raise MeshNotRunning("the mesh does not answer any more; it may have ended") from error


async def _read_start(response: httpx.Response) -> bytes:
    """The first bytes of an error's body, as many as any message has."""
    body = b""
    try:
        async for data in response.aiter_raw():
            body += data
            if len(body) >= MAX_ERROR_BYTES:
                break
    except httpx.HTTPError:
        pass  # the status says enough
    return body[:MAX_ERROR_BYTES]


def read_error(status: int, headers: Mapping[str, str], body: bytes, *, model: str | None) -> GPUMeshError:
    """The error that the gateway's reply stands for. With ``X-GPUMesh-Error`` it is the gateway's own error, else that
    of a server, which passed through."""
    message = _find_message(status, body)
    node = headers.get("X-GPUMesh-Node")
    retry_after_s = _read_seconds(headers.get("Retry-After"))
    match headers.get("X-GPUMesh-Error"):
        case "model-missing":
            return ModelMissing(model or "", hint=message.partition("; ")[2] or None)
        case "queue-full":
            return QueueFull(message.partition("; ")[0], retry_after_s=retry_after_s or 1.0)
        case "no-node":
            error = NoNodeError(message, node=node)
            error.retry_after_s = retry_after_s
            return error
        case "servers-failed":
            return ServersFailed(message, node=node)
        case "deadline":
            return DeadlineExceeded(message, node=node)
        case "bad-request" | "usage" if status in (401, 403):
            return UsageError(message, hint="gpumesh.connect(api_key=…), or the variable that mesh.yaml names")
        case "bad-request" | "usage" if status in (400, 413, 422):
            return UsageError(message)
    return BackendStatus(message, status=status, body=body, node=node)


def _find_message(status: int, body: bytes) -> str:
    error = (safe_json.parse_object(body) or {}).get("error")
    return error if isinstance(error, str) and error else error_text(status, body)


def _read_seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isascii() and text.isdigit() else None
