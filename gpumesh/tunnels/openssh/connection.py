"""Transport ``openssh``: a connection that the system's ``ssh`` holds. Runs in the worker's process.

One ``ssh`` child, the *master* (master.py), holds the connection. Its own session runs ``cat`` on the host, for three
reasons:

- sshd sets TCP_NODELAY when a session opens. Without that option a request takes 43 ms (docs/internals/tunnels.md).
- A line that ``cat`` echoes shows that the host itself is alive, and the time until the echo is the round trip.
- When our process dies, even by SIGKILL, the session's input ends; then ``cat`` ends, and then the master.

If a host allows no command, the master has no session.

Forwards are Unix sockets of the master in a 0700 folder (forwards.py). forwarder.py accepts at the node's permanent
listeners, and unix_relay.py relays to those sockets. For a reverse forward the master connects to a Unix socket of ours
in that folder. Each command is a client of the master's control socket
(commands.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpumesh.errors import ForwardingForbidden, SessionEnded, TunnelError, TunnelLost
from gpumesh.topology import HostKeyPolicy, Target
from gpumesh.tunnels import blocking
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.forwarder import BACKLOG, Dialer, Forwarder
from gpumesh.tunnels.hostkeys import adopt_keys_if_shared
from gpumesh.tunnels.known_hosts import ensure_known_hosts_file
from gpumesh.tunnels.local_system.peer_users import open_own_user_filter
from gpumesh.tunnels.openssh import commands, forwards, mux
from gpumesh.tunnels.openssh.errors import FORBIDDEN_TEXT, OPEN_FAILED_TEXT
from gpumesh.tunnels.openssh.login import log_in, was_only_session_refused
from gpumesh.tunnels.openssh.master import MasterState, OpensshMaster
from gpumesh.tunnels.openssh.options import format_destination
from gpumesh.tunnels.openssh.prompts import AskpassServer
from gpumesh.tunnels.openssh.unix_relay import relay_to_port, relay_to_unix
from gpumesh.tunnels.transport import ConnectionEvents, ConnectionInfo, ConnectRequest, has_progress

STOP_TIMEOUT_S = 1.0  # the time for the forwarder to end
SESSION_PING_INTERVAL_S = 60.0  # between two sessions as pings, because the host logs each of them


async def connect(
    setup: ConnectRequest, listeners: Sequence[socket.socket], events: ConnectionEvents
) -> OpensshConnection:
    """See ``transport.ConnectFunction``."""
    if setup.control_dir is None:
        raise TunnelError(f"there is no folder for the sockets of {setup.node}")
    folder = Path(setup.control_dir)
    if setup.ssh.host_key_policy is HostKeyPolicy.ACCEPT_NEW:
        ensure_known_hosts_file(setup.ssh.known_hosts)  # ssh itself would write into any file
    deadline = Deadline(setup.ssh.connect_timeout_s, time.monotonic)
    async with AskpassServer(folder, dict(setup.secrets), events, deadline, interactive=setup.interactive) as prompts:
        master = await log_in(setup, folder, prompts, deadline)
    adopt_keys_if_shared(setup.ssh.known_hosts, setup.known_host)
    try:
        connection = OpensshConnection(setup, master, events, listeners)
    except TunnelError:
        await master.close()
        raise
    try:
        await connection.start_forwarding(folder)
    except BaseException:
        await connection.close()
        raise
    return connection


class OpensshConnection:
    """See ``transport.HostConnection``."""

    def __init__(
        self, setup: ConnectRequest, master: OpensshMaster, events: ConnectionEvents, listeners: Sequence[socket.socket]
    ) -> None:
        """Raises ``TunnelError`` when only our own user may connect, and the users cannot be found out."""
        self._setup = setup
        self._listeners = listeners
        self._destination = format_destination(setup.ssh)
        self._master = master
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._forwarder_ended = asyncio.Event()  # set by the selector's thread, in the loop
        own_user_only = bool(listeners) and not setup.share
        peer_filter = open_own_user_filter(listeners[0], self._on_peer_refused) if own_user_only else None
        self._forwarder = Forwarder(self._on_forwarder_end, peer_filter=peer_filter)
        self._last_dialled: Target | None = None  # for errors of ssh that name no target
        self._reverse_listeners: list[socket.socket] = []  # Unix sockets, to which the master connects
        self._commands: set[commands.MuxCommand] = set()  # those that may still run
        self._session_is_in_the_way = asyncio.Event()  # the host gives one session, which the master has
        # When a session was last asked for as a ping, in seconds of ``perf_counter``, and the round trip in ms.
        self._session_ping: tuple[float, float] | None = None
        server = master.output.server  # ``None``: an ssh before 8.5 does not report the host's version
        self._server = "OpenSSH client" if server is None else f"SSH-2.0-{server}"
        self.info = ConnectionInfo(None, self._server)  # the round trip is measured later

    def __repr__(self) -> str:
        return f"<OpensshConnection {self._destination} {self._master!r} {self._forwarder!r}>"

    async def start_forwarding(self, folder: Path) -> None:
        """Starts to serve the clients of the listeners. The master's Unix sockets for this are made in ``folder``.

        Raises ``TunnelError``; ForwardingForbidden when the host forbids forwarding to all targets.
        """
        routes: list[forwards.Route] = [
            (folder / f"f{index}", target) for index, target in enumerate(self._setup.targets)
        ]
        rtt_ms: float | None = None
        if routes:
            await forwards.open_forwards(self._master, routes, self._destination)
            if self._master.state is MasterState.ECHOING:
                check = await forwards.check_forwards(self._master, routes)
                self._report_forbidden(check.forbidden)
                rtt_ms = check.rtt_ms
        if rtt_ms is None:  # nothing was checked, or no echo came in time
            rtt_ms = await self.ping(forwards.ECHO_TIMEOUT_S)
        self.info = ConnectionInfo(rtt_ms, self._server)
        self._master.on_error_line = self._on_error_line  # not earlier: refusals during the check are reported above
        for listener, (path, target) in zip(self._listeners, routes, strict=True):
            self._forwarder.listen(listener, self._make_dialer(path, target))
        reverse_routes = [(forward, folder / f"r{i}") for i, forward in enumerate(self._setup.reverse_forwards)]
        for forward, path in reverse_routes:
            self._forwarder.listen(self._listen_at(path), relay_to_port(forward.local_port, self._master.control))
        self._forwarder.start()
        await forwards.open_reverse_forwards(self._master, reverse_routes, self._destination)

    def _listen_at(self, path: Path) -> socket.socket:
        """Listens at a Unix socket in the connection's folder, until ``close``. Raises ``TunnelError``."""
        listener = socket.socket(socket.AF_UNIX)
        self._reverse_listeners.append(listener)
        try:
            listener.bind(str(path))
            listener.listen(BACKLOG)
        except OSError as error:
            raise TunnelError(f"a socket for connections of {self._destination} cannot be made: {error}") from error
        return listener

    async def ping(self, timeout_s: float) -> float | None:
        """As ``HostConnection.ping``."""
        rtt_ms = await self._measure_round_trip_ms(timeout_s)
        # ssh takes no more bytes of us once its buffers and the host's window are full. So progress is the host's.
        if rtt_ms is None and not self._master.exited and has_progress(self._forwarder.progressed_at, timeout_s):
            return timeout_s * 1000
        return rtt_ms

    async def _measure_round_trip_ms(self, timeout_s: float) -> float | None:
        """Measures an echo through the master's session, if the master has one, or else the opening of another session.
        ``None``: no answer within ``timeout_s``."""
        if self._master.state is MasterState.ECHOING:
            return await self._master.measure_round_trip_ms(timeout_s)
        if self._master.state is MasterState.WITHOUT_SESSION:
            return await self._ping_without_echo(timeout_s)
        # A SILENT master: its first echo may come now, or never.
        return await _first_result(self._master.measure_round_trip_ms(timeout_s), self._ping_without_echo(timeout_s))

    async def _ping_without_echo(self, timeout_s: float) -> float | None:
        """Pings through a master that does not echo (or not yet). Returns the round trip in ms, which was measured at
        most ``SESSION_PING_INTERVAL_S`` ago; ``None``: no answer within ``timeout_s``, or the master has ended.

        In between it is enough that the master runs: ssh pings the host every second by itself, and ends after 4 s
        without an answer.
        """
        now = time.perf_counter()
        if self._session_ping is not None and now - self._session_ping[0] < SESSION_PING_INTERVAL_S:
            is_alive = not self._master.exited and await mux.is_master_alive(self._master.control)
            return self._session_ping[1] if is_alive else None
        try:
            async with asyncio.timeout(timeout_s):
                await commands.request_session(self._master.control)
        except TimeoutError:  # the host has not answered
            return None
        if self._master.exited:
            return None
        rtt_ms = (time.perf_counter() - now) * 1000
        self._session_ping = (now, rtt_ms)
        return rtt_ms

    async def start_command(self, command: str, *, has_input: bool = False) -> commands.MuxCommand:
        """Starts the command over the master. ``Ending`` says how it can be killed on the host."""
        if has_input:
            ending = commands.Ending.BY_ITSELF
        elif self._master.state is MasterState.ECHOING and not self._master.login_shell_reads:
            # A host that echoes has run ``exec cat``. So its login shell can start a POSIX shell as well.
            ending = commands.Ending.WRAPPED
        else:
            ending = commands.Ending.UNKNOWN
        started = await commands.start_client(
            self._master.control,
            command,
            ending=ending,
            is_master_alive=self._is_master_alive,
            on_refused=self._on_session_refused,
        )
        self._commands = {command for command in self._commands if command.is_running} | {started}
        return started

    def _on_session_refused(self) -> None:
        """Called when the host gave a command no session. If no other command of ours has one, the host gives a single
        session (sshd's MaxSessions 1), and the master's own is in the way of all commands."""
        has_session = self._master.state in (MasterState.SILENT, MasterState.ECHOING)
        if has_session and not any(command.is_running for command in self._commands):
            self._session_is_in_the_way.set()

    async def wait_lost(self) -> TunnelError:
        """Waits until the connection is of no use any more, and returns the reason."""
        events = (self._forwarder_ended, self._session_is_in_the_way)
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait([self._master.exit_task, *waits], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._session_is_in_the_way.is_set():
            return SessionEnded(
                f"{self._destination} gives one session at a time, and ours left none for commands",
                hint="it is tried again without",
            )
        if not self._master.exit_task.done():  # then the forwarder has ended, by an error of ours
            return TunnelLost(f"the tunnel's process for {self._destination} stopped forwarding")
        output, status = self._master.output, self._master.process.returncode
        if not self._master.has_echoed and was_only_session_refused(output, status):
            return SessionEnded(
                f"{self._destination} ended our session, and ssh ended with it", hint="it is tried again"
            )
        return output.make_error(self._destination, was_up=True)

    async def close(self) -> None:
        try:
            await blocking.run_in_thread(self._forwarder.close, STOP_TIMEOUT_S)
        finally:
            for listener in self._reverse_listeners:
                listener.close()
            await self._master.close()

    # -- internals ---------------------------------------------------------------------------------------------------

    async def _is_master_alive(self) -> bool:
        """Whether the master answers at its control socket within ``MUX_TIMEOUT_S``."""
        try:
            async with asyncio.timeout(forwards.MUX_TIMEOUT_S):
                return await mux.is_master_alive(self._master.control)
        except TimeoutError:  # the master hangs
            return False

    def _report_forbidden(self, forbidden: Sequence[Target]) -> None:
        """Reports each forbidden target. Raises ForwardingForbidden when all targets are forbidden."""
        if forbidden and len(forbidden) == len(self._setup.targets):
            raise ForwardingForbidden(
                self._forbidden_message(forbidden[0]),
                hint="allow it in the host's sshd_config: AllowTcpForwarding yes (or local), and PermitOpen",
            )
        for target in forbidden:
            self._events.report_forward_failed(target, "forwarding-forbidden", self._forbidden_message(target))

    def _forbidden_message(self, target: Target) -> str:
        return f"the sshd at {self._destination} forbids forwarding to {target.host}:{target.port}"

    def _on_error_line(self, line: str) -> None:
        """Reports the target whose channel the host did not open, if ``line`` says so.

        ssh does not name the target. Most likely it is the target that was dialled last.
        """
        target = self._last_dialled
        if target is None or OPEN_FAILED_TEXT not in line:
            return
        if FORBIDDEN_TEXT not in line:
            message = f"nothing answers at {target.host}:{target.port} on the host"
            self._events.report_forward_failed(target, "backend-unreachable", message)
        elif len(self._setup.targets) == 1:  # otherwise the forbidden target may be another one
            self._events.report_forward_failed(target, "forwarding-forbidden", self._forbidden_message(target))

    # -- in the selector's thread ------------------------------------------------------------------------------------

    def _make_dialer(self, path: Path, target: Target) -> Dialer:
        """Makes a dialer that forwards to ``path``, the master's Unix socket for ``target``."""
        relay = relay_to_unix(str(path))

        def dial(forwarder: Forwarder, local: socket.socket) -> None:
            self._last_dialled = target
            relay(forwarder, local)

        return dial

    def _on_forwarder_end(self) -> None:
        """Called when the selector thread has ended: by an error of ours, or because the connection closes."""
        self._call_soon(self._forwarder_ended.set)

    def _on_peer_refused(self, port: int, uid: int) -> None:
        self._call_soon(self._events.report_peer_refused, port, uid)

    def _call_soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls ``function`` soon on the event loop. For the selector's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is ending
            self._loop.call_soon_threadsafe(function, *arguments)


async def _first_result(*measurements: Any) -> float | None:
    """Runs all measurements at once, and returns the first result that is not ``None``; ``None``: there is no such
    result. Cancels the measurements that still run."""
    tasks = [asyncio.create_task(measurement) for measurement in measurements]
    try:
        for finished in asyncio.as_completed(tasks):
            rtt_ms: float | None = await finished
            if rtt_ms is not None:
                return rtt_ms
        return None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
