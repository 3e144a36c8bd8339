"""The tunnel of a node without SSH: its URLs are used as they are, and its server is checked by TCP connects.

Commands (nvidia-smi, hostname) run on this machine, and only if the inference server runs here too: its URL is on
loopback, and the process that listens there does not pass connections on. The port of an ``ssh -L`` is on loopback too,
but the GPU behind that port is in another machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime

from gpumesh.errors import (
    ConnectRefused,
    ConnectTimeout,
    ExecError,
    HostUnreachable,
    HostUnresolved,
    TunnelDown,
    TunnelError,
    UsageError,
)
from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.text.addresses import is_loopback
from gpumesh.topology import NodeSpec, Target
from gpumesh.tunnels.base import ExecChunk, ExecResult, OutputStream, ProgramStream, ShellStream
from gpumesh.tunnels.direct.local_program import LocalProgram
from gpumesh.tunnels.direct.this_machine import ThisMachine, run_command
from gpumesh.tunnels.local_system.local_command import CHUNK_BYTES, exit_status, local_command
from gpumesh.tunnels.stagger import stagger_intervals

CHECK_INTERVAL_S = 2.0  # the time between two checks of all targets
CONNECT_TIMEOUT_S = 2.5  # a target that has not accepted a connection by then counts as down


class DirectTunnel:
    """See ``base.Tunnel``. The tunnel is up while any of its targets accepts a TCP connection."""

    def __init__(
        self,
        spec: NodeSpec,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[TunnelState], None],
        this_machine: ThisMachine | None = None,
    ) -> None:
        self._node = spec.name
        self._targets = spec.backend.targets
        self._clock = clock
        self._on_change = on_change
        self._this_machine = ThisMachine() if this_machine is None else this_machine
        self._loopback_targets = frozenset(target for target in self._targets if is_loopback(target.host))
        self._state = TunnelState(transport="direct")
        self._check_requested = asyncio.Event()  # ends the wait for the next check
        self._state_changed = asyncio.Event()
        self._answering_targets: tuple[Target, ...] = ()  # the targets that accepted a connection in the last check
        self._was_up = False  # whether the tunnel has ever been up

    def __repr__(self) -> str:
        return f"<DirectTunnel {self._node} {self._state.state.upper()} {len(self._answering_targets)} targets answer>"

    @property
    def state(self) -> TunnelState:
        return self._state

    @property
    def urls(self) -> Mapping[Target, str]:
        return {target: target.url.rstrip("/") for target in self._targets}

    def suspect(self, reason: str) -> None:  # noqa: ARG002 - the caller has logged the reason
        self._check_requested.set()

    def retry_now(self) -> None:
        self._check_requested.set()

    def held_closed(self) -> contextlib.AbstractContextManager[None]:
        raise UsageError(f"node {self._node} has no tunnel that could be closed: it is reached directly")

    def close(self) -> None:
        """Does nothing: a direct tunnel that never ran holds no resource."""

    async def wait_up(self) -> None:
        while self._state.state is not TunnelPhase.UP:
            if self._state.state is TunnelPhase.CLOSED:
                raise TunnelDown(f"the way to {self._node} is closed", node=self._node)
            await self._state_changed.wait()

    # -- watching ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Checks the targets at intervals, and whenever a check is requested, until cancelled."""
        self._set_phase(TunnelPhase.CONNECTING)
        try:
            for wait_s in stagger_intervals(self._node, CHECK_INTERVAL_S):
                self._check_requested.clear()
                await self._check_targets()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._check_requested.wait()
        finally:
            self._answering_targets = ()
            self._set_phase(TunnelPhase.CLOSED)

    async def _check_targets(self) -> None:
        """Connects once to each target, and sets the phase to up if any target accepts, otherwise to backoff.

        All connects run at the same time, so that a target that never answers does not delay the others.
        """
        results = await asyncio.gather(*(self._measure_handshake_ms(target) for target in self._targets))
        self._answering_targets = tuple(
            target for target, result in zip(self._targets, results, strict=True) if not isinstance(result, TunnelError)
        )
        handshakes_ms = [result for result in results if not isinstance(result, TunnelError)]
        if handshakes_ms:
            self._set_phase(TunnelPhase.UP, rtt_ms=round(min(handshakes_ms), 3))
        else:
            first_error = next(result for result in results if isinstance(result, TunnelError))
            self._set_phase(TunnelPhase.BACKOFF, error=first_error)

    async def _measure_handshake_ms(self, target: Target) -> float | TunnelError:
        """Connects once, and returns the time of the TCP handshake in ms, or the error when there is no connection."""
        address = f"{target.host}:{target.port}"
        started_at = time.perf_counter()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _reader, writer = await asyncio.open_connection(target.host, target.port)
        except TimeoutError:
            return ConnectTimeout(f"{address} does not answer within {CONNECT_TIMEOUT_S:g} s", node=self._node)
        except ConnectionRefusedError:
            hint = "is the inference server running, and does it listen on this address?"
            return ConnectRefused(f"nothing listens on {address}", hint=hint, node=self._node)
        except OSError as error:
            if error.errno is None or error.errno < 0:  # an error of getaddrinfo: its numbers are negative
                return HostUnresolved(f"the name {target.host!r} is not known", node=self._node)
            return HostUnreachable(f"{address} cannot be reached: {error.strerror}", node=self._node)
        except UnicodeError:  # IDNA: a label that is empty or too long
            return HostUnresolved(f"{target.host!r} is not a host name", node=self._node)
        handshake_ms = (time.perf_counter() - started_at) * 1000
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return handshake_ms

    def _set_phase(self, phase: TunnelPhase, *, rtt_ms: float | None = None, error: TunnelError | None = None) -> None:
        """Sets the state to this phase, and announces the state if anything in it has changed.

        ``error``: the reason why no target answers. Its message stays as ``last_error`` when the tunnel is up again.
        """
        old_state = self._state
        phase_changed = phase is not old_state.state
        reconnects = old_state.reconnects
        if phase is TunnelPhase.UP:
            if phase_changed and self._was_up:  # the first time up is no reconnect
                reconnects += 1
            self._was_up = True
        self._state = TunnelState(
            transport="direct",
            state=phase,
            since=datetime.now(UTC) if phase_changed else old_state.since,
            rtt_ms=rtt_ms,
            reconnects=reconnects,
            last_error=error.message if error else old_state.last_error,
            error_code=error.code if error else None,
            hint=error.hint if error else None,
            retry_in_s=CHECK_INTERVAL_S if phase is TunnelPhase.BACKOFF else None,
        )
        if self._state != old_state:
            changed_event, self._state_changed = self._state_changed, asyncio.Event()
            changed_event.set()
            self._on_change(self._state)

    # -- commands ----------------------------------------------------------------------------------------------------

    async def _ensure_server_is_local(self) -> None:
        """Returns if commands may run here: the tunnel is up, and the server runs on this machine. Raises TunnelDown,
        or ExecError when the server may be on another machine."""
        if self._state.state is not TunnelPhase.UP:
            raise TunnelDown(f"{self._node} is {self._state.state.value}", node=self._node)
        await self._ensure_any_is_local(self._answering_targets)

    async def _ensure_any_is_local(self, targets: Sequence[Target]) -> None:
        """Returns if the server of one of these targets runs on this machine. Raises ExecError."""
        reason = "its URL is not on this machine"
        # One answering target whose server runs here is enough; otherwise the last reason is shown.
        for target in targets:
            if target in self._loopback_targets:
                owner = await self._this_machine.find_owner(target.host, target.port)
                if owner.is_local:
                    return
                reason = owner.reason
        hint = "give the node an `ssh:` section if it is another machine; its GPU is then asked there"
        raise ExecError(f"commands cannot run on {self._node}: {reason}", hint=hint, node=self._node)

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult:
        await self._ensure_server_is_local()
        run = self._this_machine.run_shared_command if shareable else run_command
        try:
            return await run(argv, timeout_s=timeout_s, limit_bytes=limit_bytes)
        except TimeoutError as error:
            message = f"no end of {argv[0]!r} within {timeout_s:g} s on {self._node}"
            raise ExecError(message, node=self._node) from error
        except (OSError, ValueError) as error:
            raise _make_start_error(argv, self._node, error) from error

    async def open_shell(self) -> ShellStream | None:
        return None  # a command on this machine waits for no login shell

    async def open_program(self, argv: Sequence[str]) -> ProgramStream:
        # While no target answers, the node's server, which may be this program, does not run yet.
        if self._answering_targets or not self._loopback_targets:
            await self._ensure_any_is_local(self._answering_targets)
        try:
            return await LocalProgram.start(argv, self._node)
        except (OSError, ValueError) as error:
            raise _make_start_error(argv, self._node, error) from error

    async def exec_stream(self, argv: Sequence[str]) -> AsyncIterator[ExecChunk]:
        """As ``Tunnel.exec_stream``: yields the pieces of both output streams as they come, then the exit status."""
        await self._ensure_server_is_local()
        # The limit lets a slow reader stop the command. ``None``: one of the two streams has ended.
        pieces: asyncio.Queue[ExecChunk | None] = asyncio.Queue(maxsize=16)

        async def read_pipe(stream: OutputStream, pipe: asyncio.StreamReader | None) -> None:
            assert pipe is not None, "the command was started without pipes"
            while data := await pipe.read(CHUNK_BYTES):
                await pieces.put(ExecChunk(stream, data))
            await pieces.put(None)

        async with _run_local(argv, self._node) as process:
            readers = [
                asyncio.ensure_future(read_pipe(OutputStream.STDOUT, process.stdout)),
                asyncio.ensure_future(read_pipe(OutputStream.STDERR, process.stderr)),
            ]
            try:
                open_streams = len(readers)
                while open_streams:
                    piece = await pieces.get()
                    if piece is None:
                        open_streams -= 1
                    else:
                        yield piece
                await process.wait()
                yield ExecChunk(OutputStream.STDOUT, b"", ended=True, exit_status=exit_status(process))
            finally:
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)


@contextlib.asynccontextmanager
async def _run_local(argv: Sequence[str], node: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs the command during the block, to which it gives the process. Raises ExecError when it cannot be started."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            process = await stack.enter_async_context(local_command(argv))
        except (OSError, ValueError) as error:
            raise _make_start_error(argv, node, error) from error
        yield process


def _make_start_error(argv: Sequence[str], node: str, error: Exception) -> ExecError:
    """The error for a command that could not be started because of ``error``."""
    if isinstance(error, FileNotFoundError):
        return ExecError(f"{argv[0]!r} is not installed on {node} (this machine)", node=node)
    return ExecError(f"{argv[0]!r} cannot be run on {node} (this machine): {error}", node=node)
