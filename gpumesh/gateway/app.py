"""``Gateway``: the HTTP server over a mesh, from its start to its drain; it admits, answers and records each request.

``routing`` decides which handler answers a request, and ``access/guard`` whether the client may send it at all.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from gpumesh import config
from gpumesh.balancer.models.model_rules import ModelRules
from gpumesh.balancer.outcomes import RequestOutcome
from gpumesh.batches.base import BatchStore
from gpumesh.config.listen_address import UNIX_PREFIX
from gpumesh.errors import GPUMeshError
from gpumesh.gateway import ended_requests
from gpumesh.gateway.access.api_keys import read_api_keys
from gpumesh.gateway.access.client_names import ClientNames
from gpumesh.gateway.access.guard import Guard
from gpumesh.gateway.access.quotas import KeyQuotas
from gpumesh.gateway.batches.sender import GatewaySender
from gpumesh.gateway.error_shapes import error_reply, error_reply_without_path, error_status
from gpumesh.gateway.fleet_routes import FleetRoutes
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import HeaderPairs, Response
from gpumesh.gateway.http.server import Server
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.gateway.in_process import InProcessClient
from gpumesh.gateway.listener import HttpListener
from gpumesh.gateway.model_store_routes import ModelStoreRoutes
from gpumesh.gateway.observe.access_log import AccessLog
from gpumesh.gateway.observe.active_requests import ActiveRequest, ActiveRequests
from gpumesh.gateway.observe.metrics import RequestMetrics
from gpumesh.gateway.observe.recent_figures import RecentFigures
from gpumesh.gateway.observe.recent_log import RecentLog
from gpumesh.gateway.observe.record import RequestRecord
from gpumesh.gateway.page.web_page import UI_PATH, UiPage
from gpumesh.gateway.routing import Router
from gpumesh.gateway.usage.counts import measure_tokens
from gpumesh.gateway.usage.recorder import UsageRecorder
from gpumesh.gateway.usage.store import UsageStore
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import GatewayPhase, GatewayState, LocalAccess
from gpumesh.topology import Topology

log = logging.getLogger(__name__)

DRAIN_S = 10.0  # the longest time in which requests in flight may end
ABORT_S = 0.5  # after draining: the time in which handlers must end and their errors must be sent
# The page for people holds nothing of the mesh, and a health check must work without a key.
_PATHS_WITHOUT_KEY = ("/healthz", UI_PATH)


class Gateway:
    """The gateway listens inside ``async with``. The mesh must have been entered before.

    ``host`` and ``port`` replace those of mesh.yaml. On exit the gateway accepts no more clients, waits at most
    ``drain_s`` seconds until the requests in flight have ended, and closes. As soon as ``stop_now`` is set, the gateway
    stops waiting for them. ``usage_store`` keeps what each key has used; the gateway closes it. Without ``batch_store``
    it has no routes for batches. With ``listens=False`` it has no address, and its ``batch_sender`` works all the same.
    Raises UsageError if other machines can reach the address and no key is set, and MeshAlreadyRunning if it is taken.
    """

    _loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        mesh: Mesh,
        *,
        host: str | None = None,
        port: int | None = None,
        drain_s: float = DRAIN_S,
        bounds: Bounds | None = None,
        access_log: AccessLog | None = None,
        usage_store: UsageStore | None = None,
        stop_now: asyncio.Event | None = None,
        recent_log: RecentLog | None = None,
        listens: bool = True,
        batch_store: BatchStore | None = None,
    ) -> None:
        spec = mesh.topology.gateway
        self.mesh = mesh
        self.metrics = RequestMetrics(mesh.fleet.lists_model)
        self.drain_s = drain_s
        self.url = ""
        self._spec = spec
        self._listens = listens
        self._host = (host or spec.host) if listens else None
        self._access_log = access_log
        if self._host is not None:
            config.require_key_beyond_loopback(self._host, has_key=spec.needs_key)
        self._guard = guard = self.read_guard(mesh.topology)
        self._local_access = _find_local_access(self._host, needs_key=spec.needs_key)
        self._active: dict[Request, ActiveRequest] = {}  # the requests in flight
        self._numbers = itertools.count(1)  # of the requests
        self._stopped = False  # its requests are cut off from now on
        self._stop_now = stop_now or asyncio.Event()
        self._idle = asyncio.Event()  # set while no request is in flight
        self._idle.set()
        bounds = bounds or Bounds(total_body_bytes=spec.body_memory_mib << 20)  # MiB to bytes
        self._server = Server(self._handle, bounds, render_error=error_reply_without_path)
        self._listener = HttpListener(self._host, spec.port if port is None else port, spec.socket if listens else None)
        figures = RecentFigures(self.metrics, mesh.request_counters)
        active = ActiveRequests(self._active, self._server.clock)
        self._page = UiPage(mesh, active, figures, writable=spec.needs_key, recent_log=recent_log)
        self._history_task: asyncio.Task[None] | None = None  # keeps the figures of the page's last hour
        self.usage = usage = UsageRecorder(usage_store, find_label=self.metrics.model_label)
        self._quotas = KeyQuotas(clock=self._server.clock, wall_clock=time.time, read_tokens=usage.read_tokens)
        fleet_routes = FleetRoutes(mesh, self.metrics, self._server, usage)
        self._client_names = ClientNames(guard.key_names)
        stores = ModelStoreRoutes(mesh)
        self._router = Router(mesh, fleet_routes, stores, self._page, self._client_names, self._quotas, batch_store)
        in_process = InProcessClient(partial(self._handle, is_admitted=True), self._server, "batch")
        self.batch_sender = GatewaySender(in_process, mesh, usage.add_prompt)

    def __repr__(self) -> str:
        phase = "stopped" if self._stopped else self.mesh.gateway.state.value
        return f"<Gateway {self.url or 'not open'} {phase} {len(self._active)} active>"

    # -- lifetime ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self._listener.open(self._server)
        self.url = self._listener.url
        if self._host is not None and not config.is_loopback(self._host):
            log.warning(
                "the gateway listens on %s without encryption: prompts and the key can be read on the way",
                self._host,
                extra={"event": "plain-http"},
            )
        if self._listens:
            self._history_task = asyncio.create_task(self._page.keep_history(), name="page's hour")
        self._announce(GatewayPhase.SERVING)
        return self

    @property
    def listen_description(self) -> str:
        """A text for the log: all addresses, and which users of this machine can use them."""
        addresses = self.url
        socket = self._listener.unix_socket
        if socket is not None and self._host is not None:  # then ``url`` is the TCP address
            addresses += f" and {UNIX_PREFIX}{socket}"
        return f"{addresses} (local access: {self._local_access})"

    def _announce(self, phase: GatewayPhase) -> None:
        """Tells the mesh the gateway's phase and addresses, for the status."""
        if self._listens:
            socket = self._listener.unix_socket
            self.mesh.set_gateway_state(GatewayState(self.url, phase, socket=socket, access=self._local_access))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._announce(GatewayPhase.DRAINING)
        self._page.close()
        if self._history_task is not None:
            self._history_task.cancel()
            await asyncio.gather(self._history_task, return_exceptions=True)  # waits, and raises no CancelledError
        self._listener.close()
        self._server.close_idle()
        try:
            await self._drain(self.drain_s)
            if self._active:
                log.warning("requests that did not end in time and are cut: %d", len(self._active))
                await self._abort_active()
        finally:
            # The time that answers on their way still have to arrive; ``None``: the usual time.
            linger_s = ABORT_S if self._stop_now.is_set() else None
            await self._server.close(linger_s)
            if self._access_log is not None:
                self._access_log.close()
            self.usage.close()
            self.mesh.set_gateway_state(GatewayState())

    async def _drain(self, timeout_s: float) -> None:
        """Returns when no request is in flight, when ``stop_now`` is set, or after the time-out."""
        tasks = [asyncio.ensure_future(event.wait()) for event in (self._idle, self._stop_now)]
        try:
            await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _abort_active(self) -> None:
        """Ends the requests in flight with an error that tells the reason: in the stream, or with a status.

        In the first round the answers expire, and requests without an answer are cancelled. In the second round all
        tasks are cancelled: an answer that is looking for another node does not notice that it has expired. Each round
        waits at most half of ``ABORT_S``."""
        self._stopped = True
        for is_first_round in (True, False):
            for active in list(self._active.values()):
                record, task = active.record, active.task
                if is_first_round and record.answer is not None:
                    record.answer.expire(ended_requests.STOPPED_MESSAGE)
                elif task is not None:
                    task.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(ABORT_S / 2):
                    await self._idle.wait()

    # -- another mesh.yaml ---------------------------------------------------------------------------------------

    def read_guard(self, topology: Topology) -> Guard:
        """The guard by the keys and the origins of ``topology``. Raises the errors of ``read_api_keys``: a key's
        variable is not set, or two keys have the same secret."""
        spec, rules = topology.gateway, ModelRules(topology.models)
        keys = None
        if self._listens:
            read, read_file = config.read_secret, config.read_secret_file
            keys = read_api_keys(spec, read_secret=read, read_secret_file=read_file, identity=rules.identity)
        return Guard(keys, frozenset(spec.cors_origins), _find_hostnames(self._host, self._spec.socket))

    def apply(self, guard: Guard) -> None:
        """Takes over what the mesh's topology says now, for all later requests. ``guard`` comes from ``read_guard``.
        The address and the access log stay."""
        before, self._spec = self._spec, self.mesh.topology.gateway
        self._guard = guard
        self._client_names.key_names = guard.key_names
        self._local_access = _find_local_access(self._host, needs_key=self._spec.needs_key)
        self._page.writable = self._spec.needs_key
        self._page.end_streams()  # of pages whose key may not be valid any more
        self._router.apply(self._spec)
        if before.body_memory_mib != self._spec.body_memory_mib:
            self._server.memory.resize(self._spec.body_memory_mib << 20)  # MiB to bytes
        self._announce(self.mesh.gateway.state)

    def replace_access_log(self, access_log: AccessLog | None) -> None:
        """Writes the later requests to another log, or to none."""
        if self._access_log is not None:
            self._access_log.close()
        self._access_log = access_log

    # -- one request ---------------------------------------------------------------------------------------------

    async def _handle(self, request: Request, *, is_admitted: bool = False) -> Response | StreamingResponse:
        """The handler that the server calls for each request. Returns the reply: a handler's own, or an error in the
        shape of the client's API. Records the request's end. Raises ConnectionError if the client has left, or if a
        part of an answer was sent: the client could not understand an error after it. ``is_admitted``: the request
        comes from this process, has its key already, and gets an error as it is raised."""
        record = RequestRecord(self._server.clock, request.received_at, request.method, request.path)
        self._active[request] = ActiveRequest(next(self._numbers), record, asyncio.current_task(self._loop))
        self._idle.clear()
        reply: Response | StreamingResponse | None = None
        try:
            if not is_admitted:
                self._admit(request)
            reply = await self._router.route_request(request, record)
        except GPUMeshError as error:
            record.outcome = RequestOutcome.REFUSED if error_status(error) < 500 else RequestOutcome.FAILED
            reply = error_reply(record.path, error, headers=_attempt_headers(record))
            if is_admitted:
                raise
        except ConnectionError:  # the client has left: nobody could read an error
            raise
        except asyncio.CancelledError:
            reason = ended_requests.find_reason(request, record, is_stopping=self._stopped)
            if reason is None:
                raise
            reply = ended_requests.reply_with_reason(request, record, reason, is_stopping=self._stopped)
        except Exception:  # a bug of ours: one client gets an error in its API's shape, and the log has the traceback
            log.exception("a request to %s failed inside", record.route, extra={"event": "request-failed"})
            record.outcome = RequestOutcome.FAILED
            if request.answer_started:  # ``from None``: the log has the error already
                raise ConnectionError("a part of an answer has been sent already") from None
            reply = error_reply(record.path, GPUMeshError("the gateway failed inside"))
        finally:
            del self._active[request]
            if not self._active:
                self._idle.set()
            self._finish_record(request, record, reply)
        return reply

    def _finish_record(
        self, request: Request, record: RequestRecord, reply: Response | StreamingResponse | None
    ) -> None:
        """Writes the end of the request into its record, the metrics and the access log. ``reply`` ``None``: the client
        got no complete reply."""
        # A Response is sent after this, as a whole. A stream has counted the bytes that it has written.
        sent_bytes = len(reply.body) if isinstance(reply, Response) else request.sent_bytes
        if reply is None:  # the request was cancelled, or its connection broke
            record.note_client_gone(status=ended_requests.CLIENT_GONE_STATUS, sent_bytes=sent_bytes)
        else:
            reported_failure = isinstance(reply, StreamingResponse) and reply.reported_failure
            record.note_end(status=reply.status, sent_bytes=sent_bytes, reported_failure=reported_failure)
        self.metrics.add(record)
        key = request.key
        self.usage.add(record, key)
        if key is not None and key.has_quota:
            self._quotas.settle(request, measure_tokens(record))
        if self._access_log is not None:
            self._access_log.add(record, client=request.client_address, request_id=request.id)

    def _admit(self, request: Request) -> None:
        """Raises BadRequest if the client may not send this request, and QueueFull if too many connections use the
        key."""
        is_page = request.path == UI_PATH
        self._guard.require_allowed_source(request, is_own_page=is_page, backend_ports=self.mesh.local_ports)
        if request.method == "OPTIONS" or request.path in _PATHS_WITHOUT_KEY:  # browsers send a preflight without a key
            return
        request.key = key = self._guard.require_key(request.headers)
        request.register_key(None if key is None else key.label)


def _attempt_headers(record: RequestRecord) -> HeaderPairs:
    """The headers of an error reply that say how often the request was sent to nodes, and to which node last; none if
    no node has got it."""
    progress = record.progress
    if progress.node is None:
        return ()
    return (("X-GPUMesh-Node", progress.node), ("X-GPUMesh-Attempts", str(progress.attempts)))


def _find_local_access(host: str | None, *, needs_key: bool) -> LocalAccess:
    """Which users of this machine can use the gateway: any user, as with Ollama, unless a key is needed or the gateway
    has no TCP port."""
    if needs_key:
        return LocalAccess.KEY
    if host is None:  # only a Unix socket, which only the gateway's own user may open
        return LocalAccess.OWN_USER
    return LocalAccess.ANY_USER


def _find_hostnames(host: str | None, socket: Path | None) -> frozenset[str]:
    """The names that a client may send as Host, in addition to the local names."""
    names: set[str] = set()
    if host is not None:
        names.add(host.lower())
    if socket is not None:
        names.add("unix")  # some clients of a Unix socket send this name
    return frozenset(names)
