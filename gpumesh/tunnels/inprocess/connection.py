"""Transport ``sshtunnel``: paramiko below, sshtunnel's forwarder around it, our forwarding of connections inside it.

What sshtunnel does itself costs 40 ms a request and fails at many streams (facts: tunnel-latency.md). So a subclass
gives it a transport that is connected, trusted and authenticated (handshake.py, authentication.py), and a server that
serves our listening sockets through forwarder.py and channels.py. The three cures are here: a session channel right
after the login, TCP_NODELAY on the SSH socket (handshake.py), and on each accepted socket (forwarder.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import paramiko
import sshtunnel

from gpumesh.errors import ConnectTimeout, SecretMissing, TunnelError, TunnelLost
from gpumesh.printable import printable
from gpumesh.topology import SshSpec, Target
from gpumesh.tunnels import blocking, hostkeys
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.forwarder import BACKLOG, Forwarder, PeerFilter, close_with_reset, reset_on_close
from gpumesh.tunnels.heartbeat import Heartbeat
from gpumesh.tunnels.inprocess import channels, handshake, sessions
from gpumesh.tunnels.inprocess.authentication import AskPerson, Credentials, authenticate
from gpumesh.tunnels.jump_hosts import parse_jump
from gpumesh.tunnels.local_system.peer_users import open_own_user_filter
from gpumesh.tunnels.transport import ConnectionEvents, ConnectionInfo, ConnectRequest, RemoteCommand

_quiet = logging.getLogger("gpumesh.sshtunnel")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False

RELAY_CHUNK = 16 * 1024
RELAY_LOOK_S = 5.0  # at most, until a channel that closed without an event is noticed

OnChannelRefused = Callable[[Target, int], None]


class _Server:
    """Our forwarder in the place where sshtunnel keeps one server for each port. sshtunnel brings the thread."""

    daemon_threads = True

    def __init__(self, forwarder: Forwarder, port: int) -> None:
        self._forwarder = forwarder
        self.local_port = port
        self.local_host = "127.0.0.1"
        self.local_address = self.remote_address = (self.local_host, port)

    def serve_forever(self, _: float) -> None:
        self._forwarder.run()

    def shutdown(self) -> None:
        self._forwarder.close()

    def server_close(self) -> None:
        """The listening sockets are the supervisor's."""


class _FallbackServer(sshtunnel._ThreadingForwardServer):  # type: ignore[misc]  # sshtunnel has no types
    """sshtunnel's own server on a listening socket of ours; for a paramiko that channels.py does not know."""

    request_queue_size = BACKLOG

    def __init__(self, listener: socket.socket, handler: Any, logger: logging.Logger, door: PeerFilter | None) -> None:
        super().__init__(("127.0.0.1", 0), handler, bind_and_activate=False, logger=logger)
        self._door = door
        self.socket.close()
        self.socket: socket.socket = listener.dup()
        self.server_address = _address(listener)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """socketserver's question, in the thread that accepts."""
        if self._door is None or self._door.allows(request, client_address):
            return True
        close_with_reset(request)
        return False

    def server_close(self) -> None:
        super().server_close()
        if self._door is not None:
            self._door.close()


def _address(listener: socket.socket) -> tuple[str, int]:
    """As sshtunnel knows it; port 0 for a Unix socket."""
    return ("127.0.0.1", 0 if listener.family == socket.AF_UNIX else listener.getsockname()[1])


def _relay(local: socket.socket, channel: paramiko.Channel) -> None:
    """Blocking, in a thread for this connection. In place of sshtunnel's own, which ends both directions with the first
    one, and lets a cut answer look whole."""
    reading: set[socket.socket | paramiko.Channel] = {local, channel}
    while channel in reading or (local in reading and not channel.closed):
        ready, _, _ = select.select(list(reading), [], [], RELAY_LOOK_S)
        for one, other in ((local, channel), (channel, local)):
            if one not in ready:
                continue
            if data := one.recv(RELAY_CHUNK):
                other.sendall(data)
                continue
            if one is channel and not channel.eof_received:  # cut, not ended
                reset_on_close(local)
                return
            reading.discard(one)
            other.shutdown(socket.SHUT_WR)


class TransportForwarder(sshtunnel.SSHTunnelForwarder):  # type: ignore[misc]  # sshtunnel has no types
    """sshtunnel's forwarder with a given transport and given listening sockets."""

    def __init__(
        self,
        transport: paramiko.Transport,
        ssh: SshSpec,
        routes: Sequence[tuple[socket.socket, Target]],
        on_refused: OnChannelRefused,
        on_end: Callable[[], None],
        make_peer_filter: Callable[[], PeerFilter | None],
    ) -> None:
        """``make_peer_filter`` makes one for each thread that accepts."""
        self._made = transport
        self._door = make_peer_filter
        self._routes = routes
        self._on_refused = on_refused
        self._on_end = on_end
        self.uses_channels = channels.find_missing_feature(transport) is None
        self.skip_tunnel_checkup = True
        super().__init__(
            (ssh.host, ssh.port),
            ssh_config_file=None,
            ssh_username=ssh.user,
            ssh_password="-",  # noqa: S106 - it insists on one; the login is done elsewhere
            allow_agent=False,
            host_pkey_directories=[],
            remote_bind_addresses=[(target.host, target.port) for _, target in routes],
            local_bind_addresses=[_address(listener) for listener, _ in routes],
            set_keepalive=0.0,
            logger=_quiet,
        )

    def _connect_to_gateway(self) -> None:
        self._transport = self._made

    def _create_tunnels(self) -> None:
        self._connect_to_gateway()
        if self.uses_channels:
            forwarder = Forwarder(self._on_end, peer_filter=self._door())
            carrier = channels.ChannelMultiplexer(self._transport, forwarder, self._on_refused)
            for listener, target in self._routes:
                forwarder.listen(listener, carrier.make_dialer(target))
            self._serve(_Server(forwarder, _address(self._routes[0][0])[1]))
        else:
            for listener, target in self._routes:
                handler = self._make_ssh_forward_handler_class((target.host, target.port))
                self._serve(_FallbackServer(listener, handler, self.logger, self._door()))

    def _make_ssh_forward_handler_class(self, remote_address_: tuple[str, int]) -> Any:
        class Handler(super()._make_ssh_forward_handler_class(remote_address_)):  # type: ignore[misc]
            def setup(self) -> None:
                if self.request.family != socket.AF_UNIX:
                    self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the third cure

            def _redirect(self, chan: paramiko.Channel) -> None:
                _relay(self.request, chan)

        return Handler

    def _serve(self, server: Any) -> None:
        self._server_list.append(server)
        self.tunnel_is_up[server.local_address] = False


async def connect(
    setup: ConnectRequest, listeners: Sequence[socket.socket], events: ConnectionEvents
) -> ParamikoConnection:
    """See ``connection.Connect``."""
    ssh = setup.ssh
    loop = asyncio.get_running_loop()
    deadline = Deadline(ssh.connect_timeout_s, time.monotonic)

    def ask(text: str, echo: bool) -> str | None:
        return asyncio.run_coroutine_threadsafe(events.ask_person(text, echo=echo), loop).result()

    opening = _Opening(setup, credentials_from_setup(setup), deadline, ask if setup.interactive else None)
    making = asyncio.ensure_future(blocking.run_in_thread(opening.run))
    try:
        # Each step in there keeps the deadline; DNS and an agent that hangs do not, so it is kept here as well.
        while not making.done():
            await asyncio.wait({making}, timeout=deadline.remaining_s + 0.5)
            if not making.done() and deadline.expired:
                where = hostkeys.format_address(ssh.host, ssh.port)
                raise ConnectTimeout(f"no connection to {where} within {ssh.connect_timeout_s:g} s")
        transports, shell_test, heartbeat, rtt_ms = await making
    except BaseException:
        making.cancel()
        opening.give_up()
        raise
    connection = ParamikoConnection(ssh, transports, shell_test, heartbeat, rtt_ms, share=setup.share)
    try:
        connection.start_forwarding(list(zip(listeners, setup.targets, strict=True)), events)
    except TunnelError:
        await connection.close()
        raise
    return connection


def credentials_from_setup(setup: ConnectRequest) -> Credentials:
    """Raises ``SecretMissing`` when the spec names a variable and no value came along."""
    given = dict(setup.secrets)
    for name, variable in (("password", setup.ssh.password_env), ("passphrase", setup.ssh.passphrase_env)):
        if variable is not None and name not in given:
            raise SecretMissing(f"the variable {variable} ({name} of {setup.node}) is not set", hint=f"set {variable}")
    return Credentials(
        setup.ssh.user, setup.ssh.identity_files, setup.ssh.agent, given.get("password"), given.get("passphrase")
    )


class _Opening:
    """Makes the connection, jump by jump, each trusted and logged in to. Blocking; ``give_up`` ends it from outside."""

    def __init__(self, setup: ConnectRequest, who: Credentials, deadline: Deadline, ask: AskPerson | None) -> None:
        self._setup = setup
        self._who = who
        self._deadline = deadline
        self._ask = ask
        self._transports: list[paramiko.Transport] = []
        self._sessions: list[paramiko.Channel | None] = []
        self._reached: socket.socket | paramiko.Channel | None = None
        self._given_up = False

    def give_up(self) -> None:
        self._given_up = True
        for transport in reversed(self._transports):
            transport.close()
        if isinstance(self._reached, socket.socket):
            with contextlib.suppress(OSError):  # not connected any more
                self._reached.shutdown(socket.SHUT_RDWR)  # ends a handshake that is under way on it

    def run(self) -> tuple[list[paramiko.Transport], paramiko.Channel | None, Heartbeat, float | None]:
        """All transports, the host's own last; the session that tests its shell; its heartbeat, and a round trip in
        ms."""
        try:
            heartbeat = Heartbeat(self.through(self._setup.ssh.proxy_jump, self._setup.node))
            return self._transports, self._sessions[-1], heartbeat, heartbeat.measure_round_trip_ms()
        except BaseException:
            self.give_up()
            raise

    def through(self, jumps: Sequence[str], node: str, *, login: bool = True) -> paramiko.Transport:
        ssh = self._setup.ssh
        stops = [(*parse_jump(jump, ssh.user), "") for jump in jumps]
        stops.append((ssh.user, ssh.host, ssh.port, node))
        for index, (user, host, port, name) in enumerate(stops):
            self._reached = sock = self._reach(host, port)
            if self._given_up:
                sock.close()
                raise ConnectTimeout("given up")
            looks_only = index == len(stops) - 1 and not login
            if looks_only:
                kinds = hostkeys.read_known_hosts(ssh.known_hosts).key_types(node=name, host=host, port=port)
                transport = handshake.perform_handshake(
                    sock, host=host, port=port, deadline=self._deadline, key_types=kinds
                )
            else:
                transport = handshake.perform_trusted_handshake(
                    sock, node=name, host=host, port=port, ssh=ssh, deadline=self._deadline
                )
            self._transports.append(transport)
            if self._given_up:
                raise ConnectTimeout("given up")
            if not looks_only:
                where = hostkeys.format_address(host, port)
                who = Credentials(
                    user, self._who.identity_files, self._who.agent, self._who.password, self._who.passphrase
                )
                authenticate(transport, who, where=where, deadline=self._deadline, ask=self._ask)
                self._sessions.append(handshake.disable_nagle(transport, self._deadline))
        return self._transports[-1]

    def _reach(self, host: str, port: int) -> socket.socket | paramiko.Channel:
        if not self._transports:
            return handshake.connect_tcp(host, port, self._deadline)
        try:
            return self._transports[-1].open_channel(
                "direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=max(0.1, self._deadline.remaining_s)
            )
        except (paramiko.SSHException, EOFError, OSError) as error:
            where = hostkeys.format_address(host, port)
            raise TunnelError(
                f"the jump host does not reach {where}: {printable(str(error), 100)}",
                hint="check `ssh.proxy_jump`, and that the jump host allows forwarding",
            ) from error


async def fetch_host_key(
    node: str, ssh: SshSpec, *, secrets: tuple[tuple[str, str], ...] = (), timeout_s: float = 10.0
) -> hostkeys.HostKey:
    """The key that the host shows now, whether trusted or not; logs in to jump hosts only. Raises ``TunnelError``."""
    setup = ConnectRequest(node, ssh, (), secrets)
    opening = _Opening(setup, credentials_from_setup(setup), Deadline(timeout_s, time.monotonic), None)
    try:
        async with asyncio.timeout(timeout_s + 0.5):
            return handshake.get_host_key(
                await blocking.run_in_thread(opening.through, ssh.proxy_jump, node, login=False)
            )
    except TimeoutError as error:
        where = hostkeys.format_address(ssh.host, ssh.port)
        raise ConnectTimeout(f"no answer from {where} within {timeout_s:g} s", node=node or None) from error
    finally:
        opening.give_up()


class ParamikoConnection:
    """See ``connection.Connection``."""

    def __init__(
        self,
        ssh: SshSpec,
        transports: list[paramiko.Transport],
        shell_test: paramiko.Channel | None,
        heartbeat: Heartbeat,
        rtt_ms: float | None,
        *,
        share: bool = False,
    ) -> None:
        self._ssh = ssh
        self._share = share
        self._heartbeat = heartbeat
        self._transports = transports
        self._transport = cast(Any, transports[-1])  # some of what is used is not in its types
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.Task[None] | None = None
        self._pinging: asyncio.Task[float | None] | None = None
        self._posix = self._loop.create_task(sessions.has_posix_shell(shell_test))
        self._lost: asyncio.Future[TunnelError] = self._loop.create_future()
        self._gateway: TransportForwarder | None = None
        server, cipher = self._transport.remote_version, self._transport.remote_cipher
        self.info = ConnectionInfo(rtt_ms, printable(server), printable(cipher))

    def start_forwarding(self, routes: list[tuple[socket.socket, Target]], events: ConnectionEvents) -> None:
        """Starts forwarding. Raises ``TunnelError``."""

        def refused(target: Target, reason: int) -> None:  # in the transport's thread
            forbidden = reason == channels.ADMINISTRATIVELY_PROHIBITED
            where = hostkeys.format_address(self._ssh.host, self._ssh.port)
            self._soon(
                events.report_forward_failed,
                target,
                "forwarding-forbidden" if forbidden else "backend-unreachable",
                f"the sshd at {where} forbids forwarding to {target.host}:{target.port}"
                if forbidden
                else f"nothing answers at {target.host}:{target.port} on the host",
            )

        def peer_refused(port: int, uid: int) -> None:  # in a thread that accepts
            self._soon(events.report_peer_refused, port, uid)

        def door() -> PeerFilter | None:
            return None if self._share else open_own_user_filter(routes[0][0], peer_refused)

        self._watch = self._loop.create_task(self._watch_transport())
        if routes:
            self._gateway = TransportForwarder(
                self._transport, self._ssh, routes, refused, lambda: self._soon(self._ended), door
            )
            self._gateway.start()

    async def ping(self, timeout_s: float) -> float | None:
        if self._pinging is None or self._pinging.done():  # else its answer is a sign of life as well
            self._pinging = self._loop.create_task(blocking.run_in_thread(self._heartbeat.measure_round_trip_ms))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._pinging)
        except (TimeoutError, paramiko.SSHException, EOFError, OSError):
            return None

    async def start_command(self, command: str) -> RemoteCommand:
        posix = await asyncio.shield(self._posix)
        return await sessions.start_command(self._transport, command, posix=posix)

    async def wait_lost(self) -> TunnelError:
        return await asyncio.shield(self._lost)

    async def close(self) -> None:
        for task in (self._watch, self._posix):
            if task is not None:
                task.cancel()
        await blocking.run_in_thread(self._close)
        await asyncio.gather(self._posix, return_exceptions=True)

    def _close(self) -> None:
        if self._gateway is not None:
            self._gateway.stop(force=True)
        for transport in reversed(self._transports):
            transport.close()

    async def _watch_transport(self) -> None:
        await blocking.run_in_thread(self._transport.join)
        self._ended()

    def _ended(self) -> None:
        if not self._lost.done():
            where = hostkeys.format_address(self._ssh.host, self._ssh.port)
            cause = self._transport.get_exception()
            why = printable(str(cause), 120) if cause is not None else ""
            message = f"the connection to {where} broke" + (f": {why}" if why else " (closed by the host)")
            self._lost.set_result(TunnelLost(message))

    def _soon(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is ending
            self._loop.call_soon_threadsafe(function, *arguments)
