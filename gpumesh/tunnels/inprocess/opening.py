"""Opens an SSH connection with paramiko, jump host by jump host: checks each host's key and logs in. Blocking.

Also turns Nagle's algorithm off on each host. ``Opening.give_up`` ends an opening from another thread.
``fetch_host_key`` takes the same route, without the last login.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from dataclasses import dataclass, replace

import paramiko

from gpumesh.errors import ConnectTimeout, SecretMissing, TunnelError, TunnelLost
from gpumesh.text.addresses import format_address
from gpumesh.text.printable import printable
from gpumesh.topology import SshSpec
from gpumesh.tunnels import blocking
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.inprocess import handshake
from gpumesh.tunnels.inprocess.authentication import (
    Credentials,
    LoginCutOff,
    LoginRecord,
    authenticate,
)
from gpumesh.tunnels.inprocess.heartbeat import Heartbeat
from gpumesh.tunnels.inprocess.question_answerer import AskPerson
from gpumesh.tunnels.jump_hosts import list_hops
from gpumesh.tunnels.known_hosts import HostKey, KnownHost, read_known_hosts
from gpumesh.tunnels.transport import ConnectRequest

TIMEOUT_SLACK_S = 0.5  # the outer time-out is longer by this, because an error of the opening itself says more


@dataclass(frozen=True, slots=True)
class OpenedConnection:
    """An authenticated connection. ``transports``: one for each host on the route; the last is that of the node's host.

    ``shell_test``: the session that tests the host for a POSIX shell (``handshake.start_shell_test``). ``rtt_ms``:
    the first round trip; ``None`` if the connection ended before the answer.
    """

    transports: tuple[paramiko.Transport, ...]
    shell_test: paramiko.Channel | None
    heartbeat: Heartbeat
    rtt_ms: float | None


def credentials_from_setup(setup: ConnectRequest) -> Credentials:
    """The credentials for a login. Raises ``SecretMissing`` when the spec names a variable for a secret, and ``setup``
    does not have that secret."""
    secrets = dict(setup.secrets)
    for name, variable in (("password", setup.ssh.password_env), ("passphrase", setup.ssh.passphrase_env)):
        if variable is not None and name not in secrets:
            raise SecretMissing(f"the variable {variable} ({name} of {setup.node}) is not set", hint=f"set {variable}")
    return Credentials(
        user=setup.ssh.user,
        identity_files=setup.ssh.identity_files,
        agent=setup.ssh.agent,
        password=secrets.get("password"),
        passphrase=secrets.get("passphrase"),
        identities_only=setup.ssh.identities_only,
    )


class Opening:
    """One attempt to open a connection. The caller calls ``run`` or ``fetch_host_key``, and only once."""

    def __init__(self, setup: ConnectRequest, deadline: Deadline, ask: AskPerson | None) -> None:
        """``deadline``: for the whole opening. ``ask`` asks a person for a password; ``None``: nobody is there. Raises
        ``SecretMissing``."""
        self._setup = setup
        self._credentials = credentials_from_setup(setup)
        self._deadline = deadline
        self._ask_person = ask
        self._transports: list[paramiko.Transport] = []  # one for each hop, the nearest first
        self._shell_tests: list[paramiko.Channel | None] = []  # of all hosts so far; kept because they must stay open
        # The way to the last host: a socket, or a channel through the host before it.
        self._last_socket: socket.socket | paramiko.Channel | None = None
        self._given_up = False  # ``give_up`` was called: the opening must not go on

    def __repr__(self) -> str:
        state = "GIVEN UP" if self._given_up else "OPENING"
        return f"<Opening {self._setup.node} {state} {len(self._transports)} transports>"

    def run(self) -> OpenedConnection:
        """Opens and returns the connection. Raises ``TunnelError``, after everything was closed."""
        try:
            for hop in self._list_hops():
                self._connect_and_log_in(hop)
            heartbeat = Heartbeat(self._transports[-1])
            rtt_ms = heartbeat.measure_round_trip_ms()
        except BaseException:
            self.give_up()
            raise
        return OpenedConnection(tuple(self._transports), self._shell_tests[-1], heartbeat, rtt_ms)

    def fetch_host_key(self) -> HostKey:
        """Returns the key that the host shows, trusted or not. Raises ``TunnelError``.

        In both cases the caller then calls ``give_up``, which closes everything.
        """
        *jumps, host = self._list_hops()
        for hop in jumps:
            self._connect_and_log_in(hop)
        return handshake.get_host_key(self._perform_handshake(host, check_key=False))

    def give_up(self) -> None:
        """Closes everything. May be called from any thread."""
        self._given_up = True
        for transport in reversed(self._transports):
            transport.close()
        if isinstance(self._last_socket, socket.socket):  # otherwise a channel, which its transport has closed
            with contextlib.suppress(OSError):  # the socket is not connected any more
                self._last_socket.shutdown(socket.SHUT_RDWR)  # ends a handshake under way on the socket

    def _list_hops(self) -> list[_Hop]:
        """All hosts on the route: the jump hosts in order, then the node's host."""
        *jumps, host = list_hops(self._setup.ssh)
        return [*(_Hop(KnownHost(jump.host, jump.port), jump) for jump in jumps), _Hop(self._setup.known_host, host)]

    def _perform_handshake(self, hop: _Hop, *, check_key: bool = True) -> paramiko.Transport:
        """Connects to the next host, and exchanges keys with it. With ``check_key``, a host whose key is not trusted is
        an error; without it, any key is accepted.

        Raises ``TunnelError``, also after ``give_up``.
        """
        ssh = hop.ssh
        self._last_socket = sock = self._connect_through_last(ssh.host, ssh.port)
        # ``give_up`` may be called from another thread during each long step. Such a call closes what it finds, but not
        # the socket or transport that the step makes. So this function looks for the call after each step.
        if self._given_up:
            sock.close()
            raise ConnectTimeout("given up")
        if check_key:
            transport = handshake.perform_trusted_handshake(sock, hop.known_host, ssh=ssh, deadline=self._deadline)
        else:
            # The host is asked for a key of a type on record, so that the caller can compare the two keys.
            key_types = read_known_hosts(*ssh.known_hosts_files).key_types(hop.known_host)
            transport = handshake.perform_handshake(
                sock, host=ssh.host, port=ssh.port, deadline=self._deadline, key_types=key_types
            )
        self._transports.append(transport)  # the caller's ``give_up`` will close it
        if self._given_up:
            raise ConnectTimeout("given up")
        return transport

    def _connect_and_log_in(self, hop: _Hop) -> None:
        """Connects to the next host and logs in: on a second connection, too, if the host hangs up after some tries.
        Starts the shell test there, which turns off Nagle's algorithm. Raises ``TunnelError``."""
        record = LoginRecord()
        transport = self._perform_handshake(hop)
        try:
            self._log_in(hop.ssh, transport, record)
        except LoginCutOff:
            self._transports.remove(transport)
            transport.close()
            transport = self._perform_handshake(hop)
            self._log_in(hop.ssh, transport, record, is_last=True)
        self._shell_tests.append(handshake.start_shell_test(transport, self._deadline))

    def _log_in(
        self, ssh: SshSpec, transport: paramiko.Transport, record: LoginRecord, *, is_last: bool = False
    ) -> None:
        """Logs in to the host of ``transport`` as the user of ``ssh``. ``is_last``: no connection comes after this one.

        Raises ``TunnelError``, and ``LoginCutOff`` unless ``is_last``.
        """
        credentials = replace(self._credentials, user=ssh.user, identity_files=ssh.identity_files)
        address = format_address(ssh.host, ssh.port)
        try:
            authenticate(
                transport, credentials, address=address, deadline=self._deadline, ask=self._ask_person, record=record
            )
        except LoginCutOff as error:
            if not is_last:
                raise
            raise TunnelLost(f"{address} closed the connection during the login") from error

    def _connect_through_last(self, host: str, port: int) -> socket.socket | paramiko.Channel:
        """Connects to the next host: through the last transport, or directly if there is no transport yet."""
        if not self._transports:
            return handshake.connect_tcp(host, port, self._deadline)
        try:
            originator = ("127.0.0.1", 0)  # the jump host need not know from where we connect
            return self._transports[-1].open_channel(
                "direct-tcpip", (host, port), originator, timeout=max(0.1, self._deadline.remaining_s)
            )
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise TunnelError(
                f"the jump host does not reach {format_address(host, port)}: {printable(str(error), 100)}",
                hint="check `ssh.proxy_jump`, and that the jump host allows forwarding",
            ) from error


@dataclass(frozen=True, slots=True)
class _Hop:
    """One host on the route. ``known_host`` is ``ssh``'s host, as known_hosts files name it."""

    known_host: KnownHost
    ssh: SshSpec


async def fetch_host_key(
    node: str, ssh: SshSpec, *, mesh: str = "", secrets: tuple[tuple[str, str], ...] = (), timeout_s: float = 10.0
) -> HostKey:
    """Returns the key that the host shows now, trusted or not. Logs in to jump hosts only. Raises ``TunnelError``."""
    setup = ConnectRequest(node, ssh, targets=(), secrets=secrets, mesh=mesh)
    opening = Opening(setup, Deadline(timeout_s, time.monotonic), ask=None)
    try:
        async with asyncio.timeout(timeout_s + TIMEOUT_SLACK_S):
            return await blocking.run_in_thread(opening.fetch_host_key)
    except TimeoutError as error:
        address = format_address(ssh.host, ssh.port)
        raise ConnectTimeout(f"no answer from {address} within {timeout_s:g} s", node=node or None) from error
    finally:
        opening.give_up()
