"""The base of every stand-in for an inference server: a real HTTP server with an engine's timing and adjustable faults.

It behaves like Ollama, llama-server and vLLM. Before the first token it sends no byte, not even a header. If all slots
are busy, a request waits, and gets no sign. If a client closes its connection, its slot is free at once. The text has
no meaning (``text.py``).
"""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from gpumesh.lab.answers import ApiError, GenerationRequest, plan_answer
from gpumesh.lab.engine import Engine, Pacer, Timings
from gpumesh.lab.profile import Faults, HostProfile, LoggedRequest, SimCounters
from gpumesh.lab.servers.answer_writer import AnswerFrames, AnswerWriter
from gpumesh.lab.servers.replies import abort_connection, error_response

RequestHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]
MAX_BODY = 64 << 20  # bytes of a request


class SimServer(ABC):
    """One server. An async context manager; ``url`` and ``port`` are valid from its start to its end.

    ``port`` 0: a free port is chosen. A subclass adds the routes of its kind and the form of its errors.
    """

    def __init__(self, profile: HostProfile, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.profile = profile
        self.engine = Engine(profile)
        self._host = host
        self._wanted_port = port
        self._port = 0
        self._runner: web.AppRunner | None = None
        self._site: web.SockSite | None = None
        self._faults = Faults()
        self._faults_left: int | None = None
        self._faults_lock = asyncio.Lock()  # one ``set_faults`` at a time
        self._faults_changed = asyncio.Event()  # set by the next ``set_faults``, which makes a new event
        self._log: deque[_LogEntry] = deque(maxlen=10_000)
        self._count = SimCounters()
        self._http_requests = 0

    async def __aenter__(self) -> Self:
        app = web.Application(middlewares=[self._middleware], client_max_size=MAX_BODY)
        self.add_routes(app)
        # The server stops generating when its client goes: the handler is cancelled as soon as the connection ends.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._runner is not None:
            self._reset_connections()
            await self._runner.cleanup()
            self._runner = self._site = None

    @abstractmethod
    def add_routes(self, app: web.Application) -> None: ...

    def find_refusal(self, request: web.Request) -> web.Response | None:  # noqa: ARG002
        """The refusal of a request that the server does not accept at all; ``None`` if it accepts the request."""
        return None

    def build_error(self, path: str, status: int, message: str) -> web.Response:
        return error_response(path, status, message)

    def build_unknown_route_error(self) -> web.Response:
        return web.Response(status=404, text="404 page not found")

    @property
    def port(self) -> int:
        return self._port

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    @property
    def faults(self) -> Faults:
        return self._faults

    async def set_faults(self, faults: Faults) -> None:
        """Sets the faults of new requests and running answers. On return, the port is closed if ``refuse``, else
        open."""
        async with self._faults_lock:
            self._faults = self.engine.faults = faults
            changed, self._faults_changed = self._faults_changed, asyncio.Event()
            changed.set()
            self._faults_left = faults.times
            if faults.refuse and self._site is not None:
                site, self._site = self._site, None
                await site.stop()
                self._reset_connections()
            elif not faults.refuse and self._site is None and self._runner is not None:
                await self._listen()

    @property
    def counters(self) -> SimCounters:
        return replace(
            self._count,
            running=self.engine.running,
            max_running=self.engine.max_running,
            loads=self.engine.loads,
            http=self._http_requests,
            requests=tuple(entry.log for entry in self._log),
        )

    # -- answers -----------------------------------------------------------------------------------------------------

    async def write_answer(
        self, request: web.Request, generation: GenerationRequest, frames: AnswerFrames, *, stream: bool
    ) -> web.StreamResponse:
        """Generates the answer, and writes it. Exactly one of the counters finished, cancelled and failed counts it."""
        asked_at = self.engine.clock()
        answer = plan_answer(generation, self.profile)
        entry = _LogEntry(LoggedRequest(request.path, generation.model.name, asked_at, answer.prompt[-400:]))
        self._log.append(entry)
        count = self._count
        self._count = replace(
            count,
            started=count.started + 1,
            in_flight=count.in_flight + 1,
            max_in_flight=max(count.max_in_flight, count.in_flight + 1),
        )
        outcome = "failed"
        try:
            async with self.engine.lease_slot(generation.model, generation.options, generation.keep_alive) as lease:
                tokens, prefill_s = await self.engine.prefill(lease, answer.prompt)
                entry.log = replace(entry.log, prompt_tokens=tokens, queued_s=lease.queued_s, load_s=lease.load_s)
                pacer = Pacer(answer.total, lease.rate, self.engine.clock, self.engine.clock())
                writer = AnswerWriter(request, frames, answer, stream=stream, build_error=self.build_error)
                fault = await self._write_tokens(writer, pacer, entry)
                if fault is None:
                    timings = Timings(
                        total_ns=int((self.engine.clock() - asked_at) * 1e9),
                        load_ns=int(lease.load_s * 1e9),
                        prompt_tokens=tokens,
                        prompt_ns=max(1, int(prefill_s * 1e9)),
                        tokens=answer.total,
                        eval_ns=max(1, round(answer.total / lease.rate * 1e9)),
                    )
                    response = await writer.finish(timings)
                    outcome = "finished"
                    return response
                return await self._apply_fault(request, writer, fault)
        except (asyncio.CancelledError, ConnectionError):
            # aiohttp cancels the handler, or its write finds the connection gone: the client went away.
            outcome = "cancelled" if outcome == "failed" and not entry.hit_by_fault else outcome
            raise
        finally:
            self._record_outcome(entry, outcome)

    def _record_outcome(self, entry: _LogEntry, outcome: str) -> None:
        entry.log = replace(entry.log, outcome=outcome)
        count = self._count
        self._count = replace(
            count,
            in_flight=count.in_flight - 1,
            finished=count.finished + (outcome == "finished"),
            cancelled=count.cancelled + (outcome == "cancelled"),
            failed=count.failed + (outcome == "failed"),
        )

    async def _write_tokens(self, writer: AnswerWriter, pacer: Pacer, entry: _LogEntry) -> str | None:
        """Sends each token when it is due. Returns the name of the fault that stopped the answer, if one did."""
        sent = 0
        while True:
            fault, fault_at = self._find_token_fault(writer.request.path)
            if fault_at is not None and sent >= fault_at and self._use_fault(writer.request.path):
                if fault == "stall_after_tokens":
                    await self._faults_changed.wait()
                    continue
                entry.hit_by_fault = True
                return fault
            if sent >= writer.answer.total:
                return None
            due = await pacer.wait_due()
            if fault_at is not None and due > fault_at:
                due = max(fault_at, sent)
                pacer.sent = due
            if due > sent:
                await writer.send_tokens(sent, due)
                count = self._count
                self._count = replace(count, tokens=count.tokens + due - sent)
                entry.log = replace(entry.log, tokens=due)
                sent = due

    def _find_token_fault(self, path: str) -> tuple[str, int | None]:
        """Name and token count of the fault that stops an answer of this path; ``("", None)``: no fault."""
        faults = self._faults
        if self._faults_left != 0 and _hits(faults, path):
            for kind in ("cut_after_tokens", "end_after_tokens", "error_line_after_tokens", "stall_after_tokens"):
                if (token_count := getattr(faults, kind)) is not None:
                    return kind, token_count
        return "", None

    async def _apply_fault(self, request: web.Request, writer: AnswerWriter, fault: str) -> web.StreamResponse:
        """Ends the answer in the way of this fault."""
        if fault == "error_line_after_tokens":
            return await writer.fail("model runner has unexpectedly stopped, this may be due to resource limitations")
        if fault == "end_after_tokens":
            return await writer.stop()
        return await abort_connection(request, writer.response)

    # -- every request -----------------------------------------------------------------------------------------------

    @web.middleware
    async def _middleware(self, request: web.Request, handler: RequestHandler) -> web.StreamResponse:
        self._http_requests += 1
        refusal = self.find_refusal(request)
        if refusal is not None:
            return refusal
        faults = self._faults
        if (faults.hang or faults.status or faults.disconnect) and self._use_fault(request.path):
            await request.read()
            if faults.hang:
                await self._faults_changed.wait()
            elif faults.status:
                return self.build_error(
                    request.path, faults.status, _STATUS_TEXTS.get(faults.status, "simulated fault")
                )
            else:
                return await abort_connection(request, None)
        try:
            return await handler(request)
        except ApiError as refused:
            return self.build_error(request.path, refused.status, refused.message)
        except web.HTTPMethodNotAllowed as error:
            return web.Response(status=405, text="405 method not allowed", headers={"Allow": error.headers["Allow"]})
        except web.HTTPNotFound:
            return self.build_unknown_route_error()

    def _use_fault(self, path: str) -> bool:
        """Returns whether the faults hit a request of this path, and counts each hit: ``Faults.times`` limits them."""
        if not _hits(self._faults, path) or self._faults_left == 0:
            return False
        if self._faults_left is not None:
            self._faults_left -= 1
        return True

    def read_generation_request(self, body: Mapping[str, Any], **more: Any) -> GenerationRequest:
        """The request's model and name, which all APIs have in common. Raises ApiError if there is no such model."""
        name = body.get("model")
        if not isinstance(name, str) or not name:
            raise ApiError(400, "model is required")
        model = self.engine.find_model(name)
        if model is None:
            raise ApiError(404, f"model '{name}' not found")
        return GenerationRequest(model, name, **more)

    async def _listen(self) -> None:
        assert self._runner is not None
        sock = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self._host, self._port or self._wanted_port))
            self._port = sock.getsockname()[1]
            self._site = web.SockSite(self._runner, sock, backlog=1024)
            await self._site.start()
        except BaseException:
            sock.close()
            raise

    def _reset_connections(self) -> None:
        server = self._runner.server if self._runner is not None else None
        for connection in list(server.connections) if server is not None else ():
            if connection.transport is not None:
                connection.transport.abort()


class _LogEntry:
    """A request in the log."""

    def __init__(self, log: LoggedRequest) -> None:
        self.log = log
        self.hit_by_fault = False


_STATUS_TEXTS = {
    429: "too many requests",
    500: "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error",
    502: "bad gateway",
    503: "server busy, please try again.  maximum pending requests exceeded",
}


def _hits(faults: Faults, path: str) -> bool:
    return not faults.paths or path.startswith(faults.paths)
