"""Transport ``sshtunnel``: a connection that paramiko holds. Runs in the worker's process.

opening.py makes an authenticated transport. sshtunnel_connector.py forwards the node's listeners over it, sessions.py
runs commands on it, heartbeat.py pings the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import paramiko

from gpumesh.errors import ConnectTimeout, SessionRefused, TransportUnsupported, TunnelError, TunnelLost
from gpumesh.text.addresses import format_address
from gpumesh.text.printable import printable
from gpumesh.topology import SshSpec, Target
from gpumesh.tunnels import blocking
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.forwarder import PeerFilter
from gpumesh.tunnels.inprocess import sessions
from gpumesh.tunnels.inprocess.channel_multiplexer import ADMINISTRATIVELY_PROHIBITED
from gpumesh.tunnels.inprocess.opening import OpenedConnection, Opening
from gpumesh.tunnels.inprocess.reverse_channels import ReverseChannels
from gpumesh.tunnels.inprocess.sshtunnel_connector import TransportForwarder
from gpumesh.tunnels.local_system.peer_users import open_own_user_filter
from gpumesh.tunnels.remote_commands.host_text import add_host_text
from gpumesh.tunnels.transport import (
    ConnectionEvents,
    ConnectionInfo,
    ConnectRequest,
    RemoteCommand,
    ReverseForward,
    has_progress,
)

SHELL_TEST_WAIT_S = 3.0  # a command waits so long for the test whether the host has a POSIX shell
SESSION_FREE_S = 2.0  # a host has the session of an ended command back within this time
SESSION_RETRY_S = 0.1
MIN_REQUEST_S = 2.0  # the time for the answer to a request, however late the login was
DEADLINE_SLACK_S = 0.5  # the outer deadline is later by this, because an error of the opening itself says more


async def connect(
    setup: ConnectRequest, listeners: Sequence[socket.socket], events: ConnectionEvents
) -> ParamikoConnection:
    """See ``transport.ConnectFunction``."""
    loop = asyncio.get_running_loop()

    def ask(text: str, echo: bool) -> str | None:  # in the opening's thread
        return asyncio.run_coroutine_threadsafe(events.ask_person(text, echo=echo), loop).result()

    deadline = Deadline(setup.ssh.connect_timeout_s, time.monotonic)
    opening = Opening(setup, deadline, ask if setup.interactive else None)
    opened = await _run_opening(opening, setup.ssh, deadline)
    connection = ParamikoConnection(setup.ssh, opened, share=setup.share)
    try:
        routes = list(zip(listeners, setup.targets, strict=True))
        connection.start_forwarding(routes, events)
        await connection.open_reverse_forwards(setup.reverse_forwards, deadline)
    except BaseException:
        await connection.close()
        raise
    return connection


async def _run_opening(opening: Opening, ssh: SshSpec, deadline: Deadline) -> OpenedConnection:
    """Runs ``opening`` in a thread, and returns the connection. Raises ``TunnelError``.

    Enforces the deadline from outside as well: the steps of the opening check the deadline, but a DNS lookup or an
    agent may hang and never come to the next check.
    """
    opening_task = asyncio.ensure_future(blocking.run_in_thread(opening.run))
    try:
        while not opening_task.done():  # a loop: the deadline moves while a person is being asked
            await asyncio.wait({opening_task}, timeout=deadline.remaining_s + DEADLINE_SLACK_S)
            if not opening_task.done() and deadline.expired:
                address = format_address(ssh.host, ssh.port)
                raise ConnectTimeout(f"no connection to {address} within {ssh.connect_timeout_s:g} s")
        return await opening_task
    except BaseException:
        # A cancel does not stop the thread. ``give_up`` closes what the thread uses, so that its next step fails.
        opening_task.cancel()
        opening.give_up()
        raise


class ParamikoConnection:
    """See ``transport.HostConnection``."""

    def __init__(self, ssh: SshSpec, opened: OpenedConnection, *, share: bool = False) -> None:
        self._address = format_address(ssh.host, ssh.port)
        self._ssh = ssh
        self._share = share
        self._heartbeat = opened.heartbeat
        self._transports = opened.transports
        self._transport = cast(Any, opened.transports[-1])  # paramiko's types lack parts that are used here
        self._loop = asyncio.get_running_loop()
        self._transport_watch: asyncio.Task[None] | None = None
        self._ping_task: asyncio.Task[float | None] | None = None  # shared by calls of ``ping`` at the same time
        self._posix_shell_test = self._loop.create_task(sessions.has_posix_shell(opened.shell_test))
        self._test_ended_at = 0.0  # a time of the event loop; 0: there was no test, or it still runs
        if opened.shell_test is not None:
            self._posix_shell_test.add_done_callback(self._note_test_end)
        self._lost: asyncio.Future[TunnelError] = self._loop.create_future()  # its result: why the connection has ended
        self._forwarder: TransportForwarder | None = None
        server, cipher = self._transport.remote_version, self._transport.remote_cipher
        self.info = ConnectionInfo(opened.rtt_ms, printable(server), printable(cipher))

    def __repr__(self) -> str:
        state = "UP" if self._forwarder is None else "FORWARDING"
        if self._lost.done():
            state = "LOST"
        return f"<ParamikoConnection {self._address} {state}>"

    def start_forwarding(self, routes: list[tuple[socket.socket, Target]], events: ConnectionEvents) -> None:
        """Starts to serve clients. ``routes``: pairs of a listener and its target.

        Raises ``TunnelError`` when only our own user may connect, and the users cannot be found out.
        """

        def on_refused(target: Target, reason: int) -> None:  # in the transport's thread
            code, message = self._explain_refusal(target, reason)
            self._call_soon(events.report_forward_failed, target, code, message)

        def on_peer_refused(port: int, uid: int) -> None:  # in a thread that accepts
            self._call_soon(events.report_peer_refused, port, uid)

        def make_peer_filter() -> PeerFilter | None:
            if self._share:  # the connections of all users are served
                return None
            first_listener, _target = routes[0]
            return open_own_user_filter(first_listener, on_peer_refused)

        self._transport_watch = self._loop.create_task(self._watch_transport())
        if routes:
            self._forwarder = TransportForwarder(
                self._transport,
                self._ssh,
                routes,
                on_refused,
                lambda: self._call_soon(self._set_lost),
                make_peer_filter,
            )
            self._forwarder.start()

    async def open_reverse_forwards(self, forwards: Sequence[ReverseForward], deadline: Deadline) -> None:
        """Makes the host listen for the forwards, and serves their connections from now on. ``start_forwarding`` comes
        first, with at least one route. Raises ``TunnelError``."""
        if not forwards:
            return
        multiplexer = None if self._forwarder is None else self._forwarder.multiplexer
        if multiplexer is None:
            raise TransportUnsupported(
                "this version of paramiko cannot forward connections of a host to here", hint="use transport: openssh"
            )
        channels = ReverseChannels(multiplexer, forwards)
        try:
            async with asyncio.timeout(max(MIN_REQUEST_S, deadline.remaining_s)):
                await blocking.run_in_thread(channels.request, self._heartbeat, self._address)
        except TimeoutError as error:
            raise ConnectTimeout(f"{self._address} does not answer the request to listen for us") from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise TunnelLost(f"the connection to {self._address} broke: {printable(str(error), 120)}") from error

    def _explain_refusal(self, target: Target, reason: int) -> tuple[str, str]:
        """The code and the message for a channel that the host did not open, as ``ForwardFailed`` has them. ``reason``:
        a code of RFC 4254, section 5.1."""
        if reason == ADMINISTRATIVELY_PROHIBITED:
            return (
                "forwarding-forbidden",
                f"the sshd at {self._address} forbids forwarding to {target.host}:{target.port}",
            )
        return "backend-unreachable", f"nothing answers at {target.host}:{target.port} on the host"

    async def ping(self, timeout_s: float) -> float | None:
        """The time of a round trip in ms; ``None`` if the host does not answer in ``timeout_s``."""
        if self._ping_task is None or self._ping_task.done():  # otherwise this call shares the ping under way
            self._ping_task = self._loop.create_task(blocking.run_in_thread(self._heartbeat.measure_round_trip_ms))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._ping_task)
        except TimeoutError:
            return timeout_s * 1000 if has_progress(self._transport.packetizer.received_at, timeout_s) else None
        except (paramiko.SSHException, EOFError, OSError):  # the connection has broken
            return None

    async def start_command(self, command: str, *, has_input: bool = False) -> RemoteCommand:
        """Starts the command in a session of its own. Waits for the test for a POSIX shell if the host gives one
        session at a time."""
        has_posix_shell = not has_input and await self._has_posix_shell()
        while True:
            try:
                return await sessions.start_command(
                    self._transport, command, posix=has_posix_shell, has_input=has_input
                )
            except SessionRefused:
                if self._posix_shell_test.done() and self._loop.time() > self._test_ended_at + SESSION_FREE_S:
                    raise
                # The host may allow only one session, and the test for a POSIX shell has it, or had it a moment ago.
                await asyncio.wait([self._posix_shell_test])
                await asyncio.sleep(SESSION_RETRY_S)

    def _note_test_end(self, _test: asyncio.Task[bool]) -> None:
        self._test_ended_at = self._loop.time()

    async def _has_posix_shell(self) -> bool:
        """Whether the host is known to have a POSIX shell. Waits a short time for the test of the new connection. False
        while a slow login shell has not ended the test: for a later command it may be true."""
        await asyncio.wait([self._posix_shell_test], timeout=SHELL_TEST_WAIT_S)
        return self._posix_shell_test.done() and self._posix_shell_test.result()

    async def wait_lost(self) -> TunnelError:
        return await asyncio.shield(self._lost)

    async def close(self) -> None:
        if self._transport_watch is not None:
            self._transport_watch.cancel()
        self._posix_shell_test.cancel()
        await blocking.run_in_thread(self._close_blocking)
        # Waits until the test is really cancelled, because it closes its session first.
        await asyncio.gather(self._posix_shell_test, return_exceptions=True)

    def _close_blocking(self) -> None:
        if self._forwarder is not None:
            self._forwarder.stop(force=True)  # force: does not wait for the clients to end their connections
        for transport in reversed(self._transports):
            transport.close()

    async def _watch_transport(self) -> None:
        await blocking.run_in_thread(self._transport.join)
        self._set_lost()

    def _set_lost(self) -> None:
        """Ends ``wait_lost``, with the error that has ended the transport. A second call changes nothing."""
        if not self._lost.done():
            error = self._transport.get_exception()
            reason = printable(str(error), 120) if error is not None else ""
            reason_text = f": {reason}" if reason else " (closed by the host)"
            lost = TunnelLost(f"the connection to {self._address} broke{reason_text}")
            self._lost.set_result(add_host_text(lost, getattr(self._transport, "host_lines", ())))

    def _call_soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls ``function`` soon on the event loop. For other threads."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is ending
            self._loop.call_soon_threadsafe(function, *arguments)
