"""A node without SSH: its URLs are used as they are.

Commands (nvidia-smi, hostname) run here, and only if *here* is where the inference server is: the URL is on loopback
and the process that listens there is not one that leads elsewhere. The port of somebody's ``ssh -L`` is on loopback
too, and its GPU is another machine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from ipaddress import ip_address

from gpumesh.errors import ConnectRefused, ConnectTimeout, ExecError, HostUnreachable, HostUnresolved, TunnelDown
from gpumesh.errors import TunnelError as TunnelFault
from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.topology import NodeSpec, Target
from gpumesh.tunnels.base import ExecChunk, ExecResult, OutputStream
from gpumesh.tunnels.direct.this_machine import ThisMachine, exit_status, run_command
from gpumesh.tunnels.local_system.local_command import CHUNK_BYTES, local_command
from gpumesh.tunnels.stagger import stagger_intervals

CHECK_S = 2.0
TIMEOUT_S = 2.5


class DirectTunnel:
    """See ``base.Tunnel``. Up while any of its targets accepts a TCP connection. ``here`` is the mesh's."""

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
        self._here = ThisMachine() if this_machine is None else this_machine
        self._local = frozenset(target for target in self._targets if is_loopback(target.host))
        self._state = TunnelState(transport="direct")
        self._check = asyncio.Event()
        self._changed = asyncio.Event()
        self._answering: tuple[Target, ...] = ()
        self._retry_at: float | None = None
        self._was_up = False

    @property
    def state(self) -> TunnelState:
        return self._state

    @property
    def urls(self) -> Mapping[Target, str]:
        return {target: target.url.rstrip("/") for target in self._targets}

    def suspect(self, reason: str) -> None:  # noqa: ARG002 - whoever suspects has said it in its own log
        self._check.set()

    def retry_now(self) -> None:
        self._check.set()

    def close(self) -> None:
        """Nothing is held before ``run_command``."""

    async def wait_up(self) -> None:
        while self._state.state is not TunnelPhase.UP:
            if self._state.state is TunnelPhase.CLOSED:
                raise TunnelDown(f"the way to {self._node} is closed", node=self._node)
            await self._changed.wait()

    # -- watching ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        self._become(TunnelPhase.CONNECTING)
        try:
            for wait_s in stagger_intervals(self._node, CHECK_S):
                self._check.clear()
                await self._look()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._check.wait()
        finally:
            self._answering = ()
            self._become(TunnelPhase.CLOSED)

    async def _look(self) -> None:
        """Asks all candidates side by side: a black hole among them must not hide one that answers."""
        found = await asyncio.gather(*(self._connect(target) for target in self._targets))
        self._answering = tuple(
            target for target, answer in zip(self._targets, found, strict=True) if not isinstance(answer, TunnelFault)
        )
        times = [answer for answer in found if not isinstance(answer, TunnelFault)]
        if times:
            self._become(TunnelPhase.UP, rtt_ms=round(min(times), 3))
        else:
            first = next(answer for answer in found if isinstance(answer, TunnelFault))
            self._become(TunnelPhase.BACKOFF, error=first)

    async def _connect(self, target: Target) -> float | TunnelFault:
        """The TCP handshake's time in ms, or why there is none."""
        where = f"{target.host}:{target.port}"
        began = time.perf_counter()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                _reader, writer = await asyncio.open_connection(target.host, target.port)
        except TimeoutError:
            return ConnectTimeout(f"{where} does not answer within {TIMEOUT_S:g} s", node=self._node)
        except ConnectionRefusedError:
            hint = "is the inference server running, and does it listen on this address?"
            return ConnectRefused(f"nothing listens on {where}", hint=hint, node=self._node)
        except OSError as error:
            if error.errno is None or error.errno < 0:  # getaddrinfo's own numbers are negative
                return HostUnresolved(f"the name {target.host!r} is not known", node=self._node)
            return HostUnreachable(f"{where} cannot be reached: {error.strerror}", node=self._node)
        except UnicodeError:  # IDNA: a label that is empty or too long
            return HostUnresolved(f"{target.host!r} is not a host name", node=self._node)
        took_ms = (time.perf_counter() - began) * 1000
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return took_ms

    def _become(self, phase: TunnelPhase, *, rtt_ms: float | None = None, error: TunnelFault | None = None) -> None:
        old = self._state
        changed = phase is not old.state
        again = changed and phase is TunnelPhase.UP and self._was_up
        self._was_up |= phase is TunnelPhase.UP
        self._state = TunnelState(
            transport="direct",
            state=phase,
            since=datetime.now(UTC) if changed else old.since,
            rtt_ms=rtt_ms,
            reconnects=old.reconnects + again,
            last_error=error.message if error else old.last_error,
            error_code=error.code if error else None,
            hint=error.hint if error else None,
            retry_in_s=CHECK_S if phase is TunnelPhase.BACKOFF else None,
        )
        if self._state != old:
            told, self._changed = self._changed, asyncio.Event()
            told.set()
            self._on_change(self._state)

    # -- commands ----------------------------------------------------------------------------------------------------

    async def _ensure_here(self) -> None:
        """Raises TunnelDown and, when the server may be on another machine, ExecError."""
        if self._state.state is not TunnelPhase.UP:
            raise TunnelDown(f"{self._node} is {self._state.state.value}", node=self._node)
        reason = "its URL is not on this machine"
        for target in self._answering:
            if target in self._local:
                owner = await self._here.find_owner(target.host, target.port)
                if owner.is_local:
                    return
                reason = owner.reason
        hint = "give the node an `ssh:` section if it is another machine; its GPU is then asked there"
        raise ExecError(f"commands cannot run on {self._node}: {reason}", hint=hint, node=self._node)

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult:
        await self._ensure_here()
        ask = self._here.run_shared_command if shareable else run_command
        try:
            return await ask(argv, timeout_s=timeout_s, limit_bytes=limit_bytes)
        except TimeoutError as error:
            message = f"no end of {argv[0]!r} within {timeout_s:g} s on {self._node}"
            raise ExecError(message, node=self._node) from error
        except (OSError, ValueError) as error:
            raise _not_run(argv, self._node, error) from error

    async def exec_stream(self, argv: Sequence[str]) -> AsyncIterator[ExecChunk]:
        await self._ensure_here()
        pieces: asyncio.Queue[ExecChunk | None] = asyncio.Queue(maxsize=16)  # a slow reader stops the command

        async def pump(stream: OutputStream, reader: asyncio.StreamReader | None) -> None:
            assert reader is not None
            while data := await reader.read(CHUNK_BYTES):
                await pieces.put(ExecChunk(stream, data))
            await pieces.put(None)

        async with _local(argv, self._node) as process:
            pumps = [
                asyncio.ensure_future(pump(OutputStream.STDOUT, process.stdout)),
                asyncio.ensure_future(pump(OutputStream.STDERR, process.stderr)),
            ]
            try:
                open_streams = len(pumps)
                while open_streams:
                    piece = await pieces.get()
                    if piece is None:
                        open_streams -= 1
                    else:
                        yield piece
                await process.wait()
                yield ExecChunk(OutputStream.STDOUT, b"", ended=True, exit_status=exit_status(process))
            finally:
                for task in pumps:
                    task.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)


def is_loopback(host: str) -> bool:
    """By its form alone; a name other than ``localhost`` may be anywhere tomorrow."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.asynccontextmanager
async def _local(argv: Sequence[str], node: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Raises ExecError when there is no such command."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            process = await stack.enter_async_context(local_command(argv))
        except (OSError, ValueError) as error:
            raise _not_run(argv, node, error) from error
        yield process


def _not_run(argv: Sequence[str], node: str, error: Exception) -> ExecError:
    if isinstance(error, FileNotFoundError):
        return ExecError(f"{argv[0]!r} is not installed on {node} (this machine)", node=node)
    return ExecError(f"{argv[0]!r} cannot be run on {node} (this machine): {error}", node=node)
