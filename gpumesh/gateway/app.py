"""The one endpoint: a server over a mesh, and its table of routes.

Routes that concern one model go through ``proxy.forward``; those about the whole fleet are in ``fleet``, those that
change model stores in ``stores``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from gpumesh import config
from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import RequestOutcome
from gpumesh.config.locate import UNIX_PREFIX
from gpumesh.errors import GPUMeshError, NoNodeError
from gpumesh.gateway import error_shapes, proxy
from gpumesh.gateway.access_guard import Guard, is_blind_cross_site_request, is_embedding_request
from gpumesh.gateway.fleet_routes import FleetRoutes
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Handler, Request
from gpumesh.gateway.http.responses import HeaderPairs, Response, json_response
from gpumesh.gateway.http.server import Server
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.gateway.json_members import read_members, read_small_members, rewrite_body
from gpumesh.gateway.listener import HttpListener
from gpumesh.gateway.model_requests import (
    MODEL_ROUTES,
    OLLAMA_ONLY,
    ClientApi,
    Route,
    find_client_api,
    read_demand,
    read_model,
    read_node,
    read_timeout,
)
from gpumesh.gateway.model_store_routes import ModelStoreRoutes
from gpumesh.gateway.observe.access_log import AccessLog
from gpumesh.gateway.observe.metrics import RequestMetrics
from gpumesh.gateway.observe.record import RequestRecord
from gpumesh.gateway.web_page import UiPage
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import GatewayPhase, GatewayState, LocalAccess

log = logging.getLogger(__name__)

DRAIN_S = 10.0
CUT_S = 0.5  # for handlers to end, and their last words to go out, once draining is over
ONE_NODE_S = 30.0  # for what any one node answers by itself
STOPPED_MESSAGE = "the gateway was stopped"
UI = "/ui"
LOST = 499  # nginx's word for a client that left before it was answered


class _Active(NamedTuple):
    """A request that is being answered."""

    record: RequestRecord
    task: asyncio.Task[None] | None


Entry = tuple[tuple[str, ...], Handler]
_GET = ("GET", "HEAD")
_POST = ("POST",)


class Gateway:
    """Use as an async context manager around a mesh that is entered already.

    Leaving it stops accepting, lets what is in flight end (``drain_s`` at most), and closes. Raises UsageError for an
    address that others can reach without a key, MeshAlreadyRunning when the address is taken.

    ``hurried``: once it is set, what is in flight is not waited for any longer.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        host: str | None = None,
        port: int | None = None,
        drain_s: float = DRAIN_S,
        bounds: Bounds | None = None,
        access_log: AccessLog | None = None,
        stop_now: asyncio.Event | None = None,
    ) -> None:
        spec = mesh.topology.gateway
        self.mesh = mesh
        self.metrics = RequestMetrics()
        self._spec = spec
        self._host = spec.host if host is None else host
        self._port = spec.port if port is None else port
        self.drain_s = drain_s
        self._bounds = bounds or Bounds(total_body_bytes=spec.body_memory_mib << 20)
        self._access_log = access_log
        if self._host is not None:
            config.require_key_beyond_loopback(self._host, api_key_env=spec.api_key_env)
        key = None if spec.api_key_env is None else config.read_secret(spec.api_key_env).encode()
        self._access = _access(self._host, key)
        self._guard = Guard(key, frozenset(spec.cors_origins), _names(self._host, spec.socket))
        self._active: dict[Request, _Active] = {}
        self._stopped = False
        self._hurried = stop_now or asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._server = Server(self._handle, self._bounds, render_error=_error_outside_requests)
        self._listening = HttpListener(self._host, self._port, spec.socket)
        self._fleet = FleetRoutes(mesh, self.metrics, self._server)
        self._page = UiPage(mesh, writable=key is not None)
        self._recording: asyncio.Task[None] | None = None
        self._routes = _table(self._fleet, ModelStoreRoutes(mesh), self._page, self._one_node)
        self.url = ""

    # -- lifetime ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self._listening.open(self._server)
        self.url = self._listening.url
        if self._host is not None and not config.is_loopback(self._host):
            log.warning(
                "the gateway listens on %s without encryption: prompts and the key can be read on the way",
                self._host,
                extra={"event": "plain-http"},
            )
        self._recording = asyncio.create_task(self._page.keep_history(), name="page's hour")
        self._announce(GatewayPhase.SERVING)
        return self

    @property
    def listen_description(self) -> str:
        """For a log: all addresses, and who on this machine can use them."""
        socket = self._listening.unix_socket
        also = f" and {UNIX_PREFIX}{socket}" if socket is not None and self._host is not None else ""
        return f"{self.url}{also} (local access: {self._access})"

    def _announce(self, phase: GatewayPhase) -> None:
        self.mesh.set_gateway_state(
            GatewayState(self.url, phase, socket=self._listening.unix_socket, access=self._access)
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._announce(GatewayPhase.DRAINING)
        self._page.close()
        if self._recording is not None:
            self._recording.cancel()
            await asyncio.gather(self._recording, return_exceptions=True)
        self._listening.close()
        self._server.close_idle()
        try:
            await self._idle_or_hurried(self.drain_s)
            if self._active:
                log.warning("requests that did not end in time and are cut: %d", len(self._active))
                await self._cut()
        finally:
            await self._server.close(CUT_S if self._hurried.is_set() else None)
            if self._access_log is not None:
                self._access_log.close()
            self.mesh.set_gateway_state(GatewayState())

    async def _idle_or_hurried(self, timeout_s: float) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, self._hurried)]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _cut(self) -> None:
        """What is still in flight ends with an error that says why: in its stream, or with a status."""
        self._stopped = True
        for gently in (True, False):  # an answer that looks for another node just now does not hear that it is over
            for record, task in list(self._active.values()):
                if gently and record.answer is not None:
                    record.answer.expire(STOPPED_MESSAGE)
                elif task is not None:
                    task.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(CUT_S / 2):
                    await self._idle.wait()

    # -- one request ---------------------------------------------------------------------------------------------

    async def _handle(self, request: Request) -> Response | StreamingResponse:
        record = RequestRecord(self._server.clock, request.received_at, request.method, request.path)
        self._active[request] = _Active(record, asyncio.current_task())
        self._idle.clear()
        reply: Response | StreamingResponse | None = None
        try:
            reply = await self._answer(request, record)
            return reply
        finally:
            del self._active[request]
            if not self._active:
                self._idle.set()
            self._ended(request, record, reply)

    def _ended(self, request: Request, record: RequestRecord, reply: Response | StreamingResponse | None) -> None:
        sent_bytes = len(reply.body) if isinstance(reply, Response) else request.sent_bytes
        if reply is None:  # cancelled, or its connection broke
            record.note_client_gone(status=LOST, sent_bytes=sent_bytes)
        else:
            record.note_end(status=reply.status, sent_bytes=sent_bytes)
        self.metrics.add(record)
        if self._access_log is not None:
            self._access_log.add(record, client=request.client_address, request_id=request.id)

    async def _answer(self, request: Request, record: RequestRecord) -> Response | StreamingResponse:
        try:
            self._admit(request, record.path)
            return await self._route(request, record)
        except GPUMeshError as error:
            record.outcome = RequestOutcome.REFUSED if error_shapes.error_status(error) < 500 else RequestOutcome.FAILED
            return _error_reply(record.path, error)
        except ConnectionError:
            raise
        except asyncio.CancelledError:
            task, begun = asyncio.current_task(), request.unfinished_stream
            if not self._stopped or (request.answer_started and begun is None) or task is None:
                raise
            task.uncancel()
            record.outcome = RequestOutcome.FAILED
            if begun is None:
                return _error_reply(record.path, NoNodeError(STOPPED_MESSAGE, hint="try again in a moment"))
            frame = None if record.answer is None else record.answer.error_frame(STOPPED_MESSAGE)
            begun.write(frame or error_shapes.error_frame(find_client_api(record.path), 503, STOPPED_MESSAGE))
            begun.finish()
            return begun
        except Exception:  # a bug here must cost one client an error, in its dialect, and leave a trace in the log
            log.exception("a request to %s failed inside", record.route, extra={"event": "request-failed"})
            record.outcome = RequestOutcome.FAILED
            if request.answer_started:
                raise ConnectionError("a part of an answer has been sent already") from None
            return _error_reply(record.path, GPUMeshError("the gateway failed inside"))

    def _admit(self, request: Request, path: str) -> None:
        """Raises BadRequest for who may not talk to us."""
        origin, host = request.headers.get("Origin"), request.headers.get("Host")
        if not self._guard.host_allowed(host):
            words = "this Host is not served here: ask for localhost or an IP address, or set gateway.api_key_env"
            raise BadRequest(words, status=403)
        if is_embedding_request(request.headers, is_own_page=path == UI):
            words = (
                "a browser may ask for this by fetch() only, not show, embed or run it; the page for people is at /ui"
            )
            raise BadRequest(words, status=403)
        if origin is None:
            if path != UI and is_blind_cross_site_request(request.headers):
                raise BadRequest("a page of another site may ask here by CORS only", status=403)
        elif not self._guard.origin_allowed(origin, host=host, backend_ports=self.mesh.local_ports()):
            raise BadRequest("this Origin is not in gateway.cors_origins of mesh.yaml", status=403)
        else:
            request.cors = self._guard.cors_headers(origin, request.headers)
        if request.method == "OPTIONS" or path in ("/healthz", UI):
            return  # a preflight carries no key; who asks whether we are well, or for the empty page, needs none
        if not self._guard.key_allowed(request.headers):
            raise BadRequest("an API key is needed: Authorization: Bearer … or x-api-key", status=401)
        request.register_key(self._spec.api_key_env)

    async def _route(self, request: Request, record: RequestRecord) -> Response | StreamingResponse:
        path = record.path
        route = MODEL_ROUTES.get(path)
        if route is not None:
            record.route = path
            if request.method not in route.methods:
                return _not_allowed(request, record, route.methods)
            return await self._one_model(request, record, route)
        name = path
        if path.startswith("/v1/models/"):
            name = "/v1/models/{model}"
        elif path.startswith("/api/blobs/"):
            name = "/api/blobs/{digest}"
        elif path.startswith("/mesh/nodes/"):
            name = "/mesh/nodes/{node}/{action}"
        entries = self._routes.get(name)
        if entries is None:
            record.route = "other"
            raise BadRequest(f"there is no {path[:200]} here", status=404)
        record.route = name
        for methods, handler in entries:
            if request.method in methods:
                return await handler(request)
        return _not_allowed(request, record, [method for methods, _ in entries for method in methods])

    async def _one_model(self, request: Request, record: RequestRecord, route: Route) -> Response | StreamingResponse:
        demand, body = await self._read(request, route)
        record.demand = demand
        timeout_s = read_timeout(request.headers, self._spec.timeout_s)
        call = proxy.build_call(request, body)
        return await proxy.forward_request(
            self.mesh,
            request,
            demand,
            call,
            route.api,
            timeout_s=timeout_s,
            on_answer=record.note_answer,
            require_json=not route.needs_slot,
        )

    async def _read(self, request: Request, route: Route) -> tuple[Demand, bytes]:
        """What a request asks for, and its body as it is sent on: with its model by the name that all servers know."""
        body = await request.read_body()
        members = read_small_members(body) or await read_members(body, request)
        named = read_model(route, members)
        demand = read_demand(
            route,
            request.headers,
            members,
            size=len(body),
            model=named or self._spec.default_model,
            node=read_node(request.headers, self.mesh.topology),
            request_id=request.id,
        )
        if named is None:
            assert demand.model is not None, "it is the default one"
            body = await rewrite_body(body, members, request, model=demand.model)
        elif not members.has_common_spelling:
            body = await rewrite_body(body, members, request)
        return demand, body

    async def _one_node(self, request: Request) -> Response | StreamingResponse:
        """What any one node answers by itself; about a model, a node that has it."""
        record, path = self._active[request].record, request.path
        model = path.removeprefix("/v1/models/") if path.startswith("/v1/models/") else None
        node = read_node(request.headers, self.mesh.topology)
        kinds = OLLAMA_ONLY if model is None else MODEL_ROUTES["/v1/chat/completions"].kinds
        record.demand = Demand(model, kinds, node, needs_slot=False)
        call = proxy.build_call(request, await request.read_body())
        shape = find_client_api(path)
        return await proxy.forward_request(
            self.mesh,
            request,
            record.demand,
            call,
            shape,
            timeout_s=ONE_NODE_S,
            on_answer=record.note_answer,
            require_json=request.method == "GET",
        )


def _table(
    fleet: FleetRoutes, stores: ModelStoreRoutes, page: UiPage, one_node: Handler
) -> dict[str, tuple[Entry, ...]]:
    return {
        "/": ((_GET, fleet.root),),
        "/healthz": ((_GET, fleet.healthz),),
        "/metrics": ((_GET, fleet.metrics),),
        "/mesh/status": ((_GET, fleet.status),),
        "/mesh/events": ((_GET, page.events),),
        "/mesh/nodes/{node}/{action}": ((_POST, page.change_node),),
        UI: ((_GET, page.html),),
        "/api/version": ((_GET, fleet.version),),
        "/api/tags": ((_GET, fleet.tags),),
        "/api/ps": ((_GET, fleet.ps),),
        "/v1/models": ((_GET, fleet.openai_models),),
        "/v1/models/{model}": ((_GET, one_node),),
        "/api/status": ((_GET, one_node),),
        "/api/me": ((_POST, one_node),),
        "/api/signout": ((_POST, one_node),),
        "/api/pull": ((_POST, stores.pull),),
        "/api/push": ((_POST, stores.push),),
        "/api/create": ((_POST, stores.create),),
        "/api/copy": ((_POST, stores.copy),),
        "/api/delete": ((("DELETE",), stores.delete),),
        "/api/blobs/{digest}": ((("HEAD",), stores.has_blob), (_POST, stores.add_blob)),
    }


def _access(host: str | None, key: bytes | None) -> LocalAccess:
    """Who on this machine can use it: anybody, as with Ollama, unless a key is asked for or there is no TCP port."""
    if key is not None:
        return LocalAccess.KEY
    return LocalAccess.OWN_USER if host is None else LocalAccess.ANY_USER


def _names(host: str | None, path: Path | None) -> frozenset[str]:
    """Under which clients may ask for it, besides the local ones; of a Unix socket some say ``unix``."""
    return frozenset({*(() if host is None else (host.lower(),)), *(() if path is None else ("unix",))})


def _not_allowed(request: Request, record: RequestRecord, methods: Iterable[str]) -> Response:
    """405; or what a preflight asks for, its headers being those of every answer to that origin."""
    allow = (("Allow", ", ".join(sorted(methods))),)
    if request.method == "OPTIONS" and request.cors is not None:
        return Response(status=204, headers=allow)
    record.outcome = RequestOutcome.REFUSED
    return _error_reply(record.path, BadRequest("method not allowed", status=405), headers=allow)


def _error_outside_requests(status: int, message: str) -> Response:
    """Whose dialect it would be is not known where there is no path: Ollama's."""
    return json_response(error_shapes.error_body(ClientApi.OLLAMA, status, message), status=status)


def _error_reply(path: str, error: GPUMeshError, *, headers: HeaderPairs = ()) -> Response:
    status = error_shapes.error_status(error)
    wait = error_shapes.retry_after_s(error)
    if wait is not None:
        headers = (*headers, ("Retry-After", str(wait)))
    return json_response(
        error_shapes.error_body(find_client_api(path), status, error_shapes.client_message(error)),
        status=status,
        headers=headers,
        close=status in (408, 413, 417),  # the rest of that body is nothing that could be understood
    )
