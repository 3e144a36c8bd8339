"""The base of every simulated inference server: a real HTTP server with an engine's timing and adjustable faults.

It behaves as Ollama, llama-server and vLLM do. It sends no byte before the first token, not even a header. If all slots
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
from gpumesh.lab.inference.engine import Engine, Timings, record_output
from gpumesh.lab.inference.pacing import Pacer
from gpumesh.lab.profile import Faults, HostProfile, LoggedRequest, SimCounters
from gpumesh.lab.servers.answer_writer import AnswerFrames, AnswerWriter
from gpumesh.lab.servers.replies import abort_connection, error_response

RequestHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]
MAX_BODY = 64 << 20  # bytes of a request


class SimServer(ABC):
    """One simulated server. An async context manager; ``url`` and ``port`` are valid from its start to its end.

    ``port`` 0: the server chooses a free port. A subclass adds the routes of its kind and the form of its errors.
    """

    def __init__(self, profile: HostProfile, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.profile = profile
        self.engine = Engine(profile)
        self._host = host
        self._wanted_port = port
        self._port = 0
        self._runner: web.AppRunner | None = None
        self._site: web.SockSite | None = None  # ``None`` while the server refuses connections
        self._faults = Faults()
        self._fault_hits_left: int | None = None  # how many requests the faults may still hit; ``None``: no limit
        self._faults_lock = asyncio.Lock()  # one ``set_faults`` at a time
        self._faults_changed = asyncio.Event()  # set by the next ``set_faults``, which makes a new event
        self._log: deque[_LogEntry] = deque(maxlen=10_000)
        self._counters = SimCounters()
        self._http_requests = 0  # of all routes

    async def __aenter__(self) -> Self:
        app = web.Application(middlewares=[self._middleware], client_max_size=MAX_BODY)
        self.add_routes(app)
        # The server stops generating when its client goes: the handler is cancelled as soon as the connection ends. At
        # the end of the server there is little to wait for (0.1 s), because ``__aexit__`` resets all connections.
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
    def add_routes(self, app: web.Application) -> None:
        """Adds the routes of this kind of server."""

    def find_refusal(self, request: web.Request) -> web.Response | None:  # noqa: ARG002
        """The answer to a request that the server refuses before it handles the route; ``None``: it is not refused."""
        return None

    def build_error(self, path: str, status: int, message: str) -> web.Response:
        """Builds an error in the form of this kind of server: by default Ollama's."""
        return error_response(path, status, message)

    def build_unknown_route_error(self) -> web.Response:
        """Builds the answer to a path that the server does not know: by default Ollama's."""
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
        """Replaces the faults, also of the answers that run. On return, the port is closed if ``refuse``, else open."""
        async with self._faults_lock:
            self._faults = self.engine.faults = faults
            self._faults_changed.set()  # requests that hang or stall go on
            self._faults_changed = asyncio.Event()
            self._fault_hits_left = faults.times
            if faults.refuse and self._site is not None:
                site, self._site = self._site, None
                await site.stop()
                self._reset_connections()
            elif not faults.refuse and self._site is None and self._runner is not None:
                await self._listen()  # the server runs, and earlier faults have closed its port

    @property
    def counters(self) -> SimCounters:
        """The counters since the server was made."""
        return replace(
            self._counters,
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
        """Generates the answer in the time that the engine takes, and writes it to the client. Returns the response.

        ``frames`` is the form of the answer. The request is counted and logged with its outcome: finished, cancelled or
        failed. Raises ApiError before the first byte if the request is refused.
        """
        asked_at = self.engine.clock()
        answer = plan_answer(generation, self.profile)
        prompt_end = answer.prompt[-400:]  # enough to recognize a request; whole prompts would fill the memory
        entry = _LogEntry(LoggedRequest(request.path, generation.model.name, asked_at, prompt_end))
        self._record_start(entry)
        outcome = "failed"  # until the answer is complete or the client has gone
        try:
            async with self.engine.lease_slot(generation.model, generation.options, generation.keep_alive) as lease:
                prompt_tokens, prefill_s = await self.engine.prefill(lease, answer.prompt)
                entry.log = replace(
                    entry.log,
                    prompt_tokens=prompt_tokens,
                    read_tokens=lease.read_tokens,
                    queued_s=lease.queued_s,
                    load_s=lease.load_s,
                )
                pacer = self.engine.start_decoding(lease, answer.total)
                writer = AnswerWriter(request, frames, answer, stream=stream, build_error=self.build_error)
                try:
                    fault = await self._write_tokens(writer, pacer, entry)
                finally:  # the tokens that were sent, also if a fault or the client has stopped the answer
                    record_output(lease, "".join((*answer.thinking, *answer.tokens)[: pacer.sent]))
                if fault is None:
                    load_ns, queued_ns = int(lease.load_s * 1e9), int(lease.queued_s * 1e9)
                    # At least 1 ns: Ollama's frames leave out a counter that is 0.
                    prompt_ns = max(1, int(prefill_s * 1e9))
                    eval_ns = max(1, round(pacer.measure_decoding() * 1e9))
                    timings = Timings(
                        # The sum, not the time on the clock: a busy machine sends tokens late. Ollama's durations have
                        # such a delay in them; these have not, so it would look like a wait for a slot.
                        total_ns=load_ns + queued_ns + prompt_ns + eval_ns,
                        load_ns=load_ns,
                        prompt_tokens=prompt_tokens,
                        prompt_ns=prompt_ns,
                        tokens=answer.total,
                        eval_ns=eval_ns,
                    )
                    response = await writer.finish(timings)
                    outcome = "finished"
                    return response
                return await self._apply_fault(request, writer, fault)
        except (asyncio.CancelledError, ConnectionError):
            # The client has closed its connection: aiohttp cancels the handler, or a write fails. The outcome is still
            # "failed" if a fault had stopped the answer before.
            if outcome == "failed" and not entry.hit_by_fault:
                outcome = "cancelled"
            raise
        finally:
            self._record_outcome(entry, outcome)

    def _record_start(self, entry: _LogEntry) -> None:
        """Counts a request that starts, and adds it to the log."""
        self._log.append(entry)
        counters = self._counters
        in_flight = counters.in_flight + 1
        self._counters = replace(
            counters,
            started=counters.started + 1,
            in_flight=in_flight,
            max_in_flight=max(counters.max_in_flight, in_flight),
        )

    def _record_outcome(self, entry: _LogEntry, outcome: str) -> None:
        """Counts the end of a request and writes it to the log. ``outcome``: finished, cancelled or failed."""
        entry.log = replace(entry.log, outcome=outcome)
        counters = self._counters
        self._counters = replace(
            counters,
            in_flight=counters.in_flight - 1,
            finished=counters.finished + (outcome == "finished"),
            cancelled=counters.cancelled + (outcome == "cancelled"),
            failed=counters.failed + (outcome == "failed"),
        )

    async def _write_tokens(self, writer: AnswerWriter, pacer: Pacer, entry: _LogEntry) -> str | None:
        """Sends each token when it is due. Returns the name of the fault that stops the answer, or ``None``.

        ``None``: the answer is complete. The names are those of the fields of ``Faults``. While the answer stalls, this
        waits until the faults change.
        """
        sent = 0
        while True:
            fault, stop_at = self._find_token_fault(writer.request.path)  # may have changed since the last token
            # ``_use_fault`` comes last, because it counts a hit.
            if stop_at is not None and sent >= stop_at and self._use_fault(writer.request.path):
                if fault == "stall_after_tokens":
                    await self._faults_changed.wait()
                    continue  # with the new faults
                entry.hit_by_fault = True
                return fault
            if sent >= writer.answer.total:
                return None
            due_tokens = await pacer.wait_due()
            # Several tokens can be due at once: stop exactly at the fault.
            if stop_at is not None and due_tokens > stop_at:
                due_tokens = max(stop_at, sent)
                pacer.sent = due_tokens
            if due_tokens > sent:
                await writer.send_tokens(sent, due_tokens)
                self._counters = replace(self._counters, tokens=self._counters.tokens + due_tokens - sent)
                entry.log = replace(entry.log, tokens=due_tokens)
                sent = due_tokens

    def _find_token_fault(self, path: str) -> tuple[str, int | None]:
        """The fault that stops answers of this path: its name, and after how many tokens. ``("", None)``: no fault."""
        faults = self._faults
        may_still_hit = self._fault_hits_left != 0
        if may_still_hit and _hits(faults, path):
            for name in ("cut_after_tokens", "end_after_tokens", "error_line_after_tokens", "stall_after_tokens"):
                token_count = getattr(faults, name)
                if token_count is not None:
                    return name, token_count
        return "", None

    async def _apply_fault(self, request: web.Request, writer: AnswerWriter, fault: str) -> web.StreamResponse:
        """Ends the answer as the fault says: with an error, with the end of the body, or else with a reset.

        ``fault`` is the name of a field of ``Faults``, as ``_write_tokens`` returns it.
        """
        if fault == "error_line_after_tokens":
            return await writer.fail("model runner has unexpectedly stopped, this may be due to resource limitations")
        if fault == "end_after_tokens":
            return await writer.stop()
        return await abort_connection(request, writer.response)

    # -- every request -----------------------------------------------------------------------------------------------

    @web.middleware
    async def _middleware(self, request: web.Request, handler: RequestHandler) -> web.StreamResponse:
        """Handles each HTTP request: counts it, refuses it, applies a fault, or calls the route's handler.

        Applies the first of the faults ``hang``, ``status`` and ``disconnect`` that is set.
        """
        self._http_requests += 1
        refusal = self.find_refusal(request)
        if refusal is not None:
            return refusal
        faults = self._faults
        has_fault = faults.hang or faults.status or faults.disconnect
        if has_fault and self._use_fault(request.path):  # ``_use_fault`` counts a hit: only if there is such a fault
            await request.read()
            if faults.hang:
                await self._faults_changed.wait()  # afterwards the request is handled as usual
            elif faults.status:
                message = _STATUS_TEXTS.get(faults.status, "simulated fault")
                return self.build_error(request.path, faults.status, message)
            else:
                return await abort_connection(request, None)
        try:
            return await handler(request)
        except ApiError as error:
            return self.build_error(request.path, error.status, error.message)
        except web.HTTPMethodNotAllowed as error:
            return web.Response(status=405, text="405 method not allowed", headers={"Allow": error.headers["Allow"]})
        except web.HTTPNotFound:
            return self.build_unknown_route_error()

    def _use_fault(self, path: str) -> bool:
        """Returns whether the faults hit a request of this path, and counts each hit: ``Faults.times`` limits them."""
        if not _hits(self._faults, path) or self._fault_hits_left == 0:
            return False
        if self._fault_hits_left is not None:
            self._fault_hits_left -= 1
        return True

    def read_generation_request(self, body: Mapping[str, Any], **more: Any) -> GenerationRequest:
        """Makes a ``GenerationRequest`` of the body's ``model``, which all APIs have, and of ``more`` fields.

        Raises ApiError if the model is not stored here.
        """
        name = body.get("model")
        if not isinstance(name, str) or not name:
            raise ApiError(400, "model is required")
        model = self.engine.find_model(name)
        if model is None:
            raise ApiError(404, f"model '{name}' not found")
        return GenerationRequest(model, name, **more)

    async def _listen(self) -> None:
        """Opens the port: the same port as before ``Faults.refuse``, or the caller's port, or a free port."""
        assert self._runner is not None, "the server has not started"
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
        """Closes the connections of all clients at once. Answers that run are cut."""
        if self._runner is None or self._runner.server is None:
            return
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()


class _LogEntry:
    """A request in the log. ``log`` is replaced as the request goes on. ``hit_by_fault``: a fault stops its answer."""

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
    """Whether the faults concern requests of this path."""
    return not faults.paths or path.startswith(faults.paths)
