"""The one endpoint: a server over a mesh, and its table of routes.

Routes that concern one model go through ``proxy.forward``; those about the whole fleet are answered here from every
node's own answer (``merge``).
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from gpumesh import __version__, config
from gpumesh.backends.base import HttpCall
from gpumesh.balancer.base import Demand
from gpumesh.errors import GPUMeshError, MeshAlreadyRunning
from gpumesh.gateway import errors, merge, proxy
from gpumesh.gateway.guard import Guard
from gpumesh.gateway.requests import (
    MODEL_ROUTES,
    OLLAMA_ONLY,
    BadRequest,
    read_demand,
    read_object,
    read_timeout,
    shape_of,
)
from gpumesh.mesh.answer import Answer
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import BackendPhase, GatewayPhase, GatewayState
from gpumesh.topology import BackendKind
from gpumesh.wire import status_json

BODY_BYTES = 256 << 20  # images come inside of JSON
HEAD_BYTES = 32 << 10
HEAD_TIMEOUT_S = 30.0
LIST_TIMEOUT_S = 3.0  # a node that is slower than this is missing from a merged list
DRAIN_S = 10.0

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Gateway:
    """Use as an async context manager around a mesh that is entered already.

    Leaving it stops accepting, lets what is in flight end (``drain_s`` at most), and closes. Raises
    MeshAlreadyRunning when the address is taken.
    """

    def __init__(
        self, mesh: Mesh, *, host: str | None = None, port: int | None = None, drain_s: float = DRAIN_S
    ) -> None:
        spec = mesh.topology.gateway
        self.mesh = mesh
        self._spec = spec
        self._host = spec.host if host is None else host
        self._port = spec.port if port is None else port
        self.drain_s = drain_s
        key = None if spec.api_key_env is None else config.secret(spec.api_key_env).encode()
        self._guard = Guard(key, frozenset(spec.cors_origins), frozenset({self._host.lower()}))
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._runner: web.ServerRunner | None = None
        self._fleet: dict[str, Handler] = {
            "/": self._root,
            "/healthz": self._healthz,
            "/mesh/status": self._status,
            "/api/version": self._version,
            "/api/tags": self._tags,
            "/api/ps": self._ps,
            "/v1/models": self._openai_models,
        }
        self.url = ""

    # -- lifetime ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        server = web.Server(
            self._handle,
            request_factory=self._make_request,
            handler_cancellation=True,
            max_line_size=HEAD_BYTES,
            max_field_size=HEAD_BYTES,
            lingering_time=0.0,
            access_log=None,
        )
        self._runner = web.ServerRunner(server)
        await self._runner.setup()
        listener = self._listen()
        await web.SockSite(self._runner, listener, backlog=1024).start()
        port = listener.getsockname()[1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{port}"
        self.mesh.announce(GatewayState(self.url, GatewayPhase.SERVING))
        return self

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._host, self._port))
        except OSError as error:
            listener.close()
            raise MeshAlreadyRunning(
                f"the gateway cannot listen on {self._host}:{self._port}: {error.strerror}",
                hint="another program (or another mesh) has that port; `--listen 127.0.0.1:0` takes any free one",
            ) from error
        return listener

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        self.mesh.announce(GatewayState(self.url, GatewayPhase.DRAINING))
        for site in list(self._runner.sites):
            await site.stop()
        try:
            async with asyncio.timeout(self.drain_s):
                await self._idle.wait()
        except TimeoutError:
            pass  # what takes longer is cut: the caller set the bound
        finally:
            await self._runner.cleanup()
            self.mesh.announce(GatewayState())

    def _make_request(
        self, message: Any, payload: Any, protocol: Any, writer: Any, task: asyncio.Task[None]
    ) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=BODY_BYTES)

    # -- one request ---------------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._busy += 1
        self._idle.clear()
        try:
            return await self._answer(request)
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        origin = request.headers.get("Origin")
        try:
            self._admit(request, origin)
            if request.method == "OPTIONS" and origin is not None:
                response: web.StreamResponse = web.Response(status=204)
            else:
                response = await self._route(request, path)
        except web.HTTPRequestEntityTooLarge:
            response = self._error_response(request, BadRequest("the request body is too large", status=413))
        except GPUMeshError as error:
            response = self._error_response(request, error)
        if origin is not None and not response.prepared and self._guard.origin_allowed(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Headers"] = "*, Authorization"
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, HEAD"
            response.headers["Vary"] = "Origin"
        return response

    def _admit(self, request: web.BaseRequest, origin: str | None) -> None:
        if not self._guard.host_allowed(request.headers.get("Host")):
            raise BadRequest("this Host is not served here", status=403)
        if not self._guard.origin_allowed(origin):
            raise BadRequest("this Origin is not in gateway.cors_origins of mesh.yaml", status=403)
        if request.method != "OPTIONS" and not self._guard.key_allowed(request.headers):
            raise BadRequest("an API key is needed: Authorization: Bearer … or x-api-key", status=401)

    def _error_response(self, request: web.BaseRequest, error: GPUMeshError) -> web.Response:
        status = errors.status_of(error)
        body = errors.body(shape_of(request.path), status, errors.words_of(error))
        response = web.Response(body=body, status=status, content_type="application/json")
        wait = errors.retry_after_s(error)
        if wait is not None:
            response.headers["Retry-After"] = str(wait)
        if status == 413:
            response.force_close()
        return response

    async def _route(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        route = MODEL_ROUTES.get(path)
        if route is not None:
            if request.method not in route.methods:
                raise BadRequest("method not allowed", status=405)
            body = await request.read()
            demand = read_demand(route, request.headers, body, default_model=self._spec.default_model)
            timeout_s = read_timeout(request.headers, self._spec.timeout_s)
            call = proxy.call_of(request, body)
            return await proxy.forward(
                self.mesh, request, demand, call, route.shape, timeout_s=timeout_s, answered=_unwatched
            )
        handler = self._fleet.get(path)
        if handler is not None:
            if request.method not in ("GET", "HEAD"):
                raise BadRequest("method not allowed", status=405)
            return await handler(request)
        if path.startswith("/v1/models/") and request.method == "GET":
            return await self._one_openai_model(request, path.removeprefix("/v1/models/"))
        if path in ("/api/pull", "/api/delete", "/api/copy", "/api/create", "/api/push") or path.startswith(
            "/api/blobs/"
        ):
            return await self._on_named_node(request)
        raise BadRequest(f"there is no {path} here", status=404)

    # -- routes of the fleet -------------------------------------------------------------------------------------

    async def _root(self, _request: web.BaseRequest) -> web.Response:
        return web.Response(text="Ollama is running")

    async def _healthz(self, _request: web.BaseRequest) -> web.Response:
        usable = self.mesh.usable()
        document = {"status": "ok" if usable else "no node can serve", "nodes_usable": len(usable)}
        return _json(document, status=200 if usable else 503)

    async def _status(self, _request: web.BaseRequest) -> web.Response:
        return _json(status_json(self.mesh.snapshot()))

    async def _version(self, _request: web.BaseRequest) -> web.Response:
        """The oldest version of all nodes: what a client may rely on, whichever node answers."""
        versions = [
            node.backend.version
            for node in self.mesh.snapshot().nodes
            if node.backend.kind == BackendKind.OLLAMA
            and node.backend.state is BackendPhase.UP
            and node.backend.version is not None
        ]
        return _json({"version": min(versions, key=_version_key) if versions else __version__})

    async def _tags(self, _request: web.BaseRequest) -> web.Response:
        return _raw(merge.tags(await self._ask_all("/api/tags", OLLAMA_ONLY)))

    async def _ps(self, _request: web.BaseRequest) -> web.Response:
        return _raw(merge.loaded(await self._ask_all("/api/ps", OLLAMA_ONLY)))

    async def _openai_models(self, _request: web.BaseRequest) -> web.Response:
        return _raw(merge.openai_models(await self._ask_all("/v1/models", frozenset(BackendKind))))

    async def _one_openai_model(self, request: web.BaseRequest, model: str) -> web.StreamResponse:
        demand = Demand(model=model, node=request.headers.get("X-GPUMesh-Node"), place=False)
        call = proxy.call_of(request, b"")
        shape = shape_of(request.path)
        return await proxy.forward(self.mesh, request, demand, call, shape, timeout_s=30.0, answered=_unwatched)

    async def _on_named_node(self, request: web.BaseRequest) -> web.StreamResponse:
        """What changes a model store goes to the node that the client names, or to the only one that there is."""
        node = request.headers.get("X-GPUMesh-Node")
        stores = self.mesh.usable(OLLAMA_ONLY)
        if node is None:
            if len(stores) > 1:
                raise BadRequest(f"say which node is meant in the header X-GPUMesh-Node: {', '.join(stores)}")
            node = stores[0] if stores else None
        body = await request.read()
        if not request.path.startswith("/api/blobs/"):
            read_object(body)
        demand = Demand(model=None, kinds=OLLAMA_ONLY, node=node, place=False)
        call = proxy.call_of(request, body)
        timeout_s = read_timeout(request.headers, 86400.0)  # a pull takes as long as it takes
        shape = shape_of(request.path)
        return await proxy.forward(self.mesh, request, demand, call, shape, timeout_s=timeout_s, answered=_unwatched)

    async def _ask_all(self, path: str, kinds: frozenset[BackendKind]) -> Iterable[bytes]:
        """The bodies of those that answered in time."""

        async def ask(node: str) -> bytes | None:
            demand = Demand(model=None, kinds=kinds, node=node, place=False)
            calls = dict.fromkeys(BackendKind, HttpCall("GET", path))
            try:
                answer = await self.mesh.send(demand, calls, timeout_s=LIST_TIMEOUT_S)
                return await answer.read() if answer.status == 200 else None
            except GPUMeshError:
                return None  # its absence from the list is what a client can be told

        bodies = await asyncio.gather(*(ask(node) for node in self.mesh.usable(kinds)))
        return [body for body in bodies if body is not None]


def _unwatched(_answer: Answer) -> None:
    return None


def _json(document: object, *, status: int = 200) -> web.Response:
    return _raw(json.dumps(document).encode(), status=status)


def _raw(body: bytes, *, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def _version_key(version: str) -> tuple[int, ...]:
    """``0.12.6-rc1`` -> (0, 12, 6); what is no number counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.partition("-")[0].split("."))
