"""From an address to an SSH transport whose host key is trusted, with the true reason when that fails. Blocking.

Why not leave it to sshtunnel: it connects without a deadline, and swallows DNS, host-key and authentication failures
into one generic error (facts: tunnel-latency.md). It gets a transport that is connected already.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import paramiko
from paramiko.common import cMSG_CHANNEL_REQUEST

from gpumesh.errors import (
    ConnectRefused,
    ConnectTimeout,
    HostUnreachable,
    HostUnresolved,
    NotSsh,
    TransportUnsupported,
    TunnelError,
    TunnelLost,
)
from gpumesh.printable import printable
from gpumesh.topology import SshSpec
from gpumesh.tunnels import hostkeys
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.hostkeys import HostKey, host_key_algorithms
from gpumesh.tunnels.jump_hosts import parse_jump
from gpumesh.tunnels.remote_command import SHELL_TEST

FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")  # a third less delay than CTR with HMAC
KEPT_GREETING_BYTES = 512
GREETING_BYTES = 32 << 10  # RFC 4253 section 4.2: lines may come before the version, and each is short
PACKET_BYTES = 256 << 10  # as OpenSSH has it; a channel of ours takes far smaller ones
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EADDRNOTAVAIL)


class BufferedSocket:
    """A socket as paramiko uses one, with read-ahead: paramiko asks for each packet's first 16 bytes and then for its
    rest, and each such call would give the interpreter's lock away. Also remembers how the peer's greeting began."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = b""
        self._at = 0
        self.greeting = b""

    def recv(self, size: int) -> bytes:
        data = self._data
        if self._at >= len(data):
            data = self._sock.recv(65536)
            if len(self.greeting) < KEPT_GREETING_BYTES:
                self.greeting += data[:KEPT_GREETING_BYTES]
            if len(data) <= size:
                return data
            self._data = data
            self._at = 0
        start = self._at
        self._at = start + size
        return data[start : self._at]

    def take_buffered(self, size: int) -> bytes | None:
        """Exactly ``size`` bytes, if so many have been read ahead."""
        start = self._at
        end = start + size
        if end > len(self._data):
            return None
        self._at = end
        return self._data[start:end]

    def send(self, data: bytes) -> int:
        return self._sock.send(data)

    def settimeout(self, timeout_s: float | None) -> None:
        self._sock.settimeout(timeout_s)

    def getpeername(self) -> Any:
        return self._sock.getpeername()

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    @property
    def _closed(self) -> bool:
        """paramiko's ``Transport.stop_thread`` looks at this private attribute of a socket."""
        return self._sock.fileno() < 0


class BoundedPacketizer(paramiko.packet.Packetizer):
    """paramiko's, with a bound for what a host announces or begins: a line of its greeting, or a packet. paramiko would
    collect 4 GiB of either, joining them anew with each piece."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._greeting_size = 0

    def _read_timeout(self, timeout: float) -> bytes:
        """A piece of a line of the greeting: the only thing that is read by lines."""
        piece: bytes = super()._read_timeout(timeout)  # type: ignore[misc]
        self._greeting_size += len(piece)
        if self._greeting_size > GREETING_BYTES:
            raise paramiko.SSHException(f"a greeting of more than {GREETING_BYTES >> 10} KiB")
        return piece

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        if n > PACKET_BYTES:
            raise paramiko.SSHException(f"a packet of {n} bytes")
        return super().read_all(n, check_rekey)


class FastPacketizer(BoundedPacketizer):
    """Without what it does for each packet that is needed for the first ones only: of a stream of tokens,
    each of which is a packet, that is a third of the work."""

    def __init__(self, sock: BufferedSocket) -> None:
        super().__init__(cast(socket.socket, sock))  # it needs no more of a socket than this
        self._take: Callable[[int], bytes | None] | None = None
        self._ahead = sock

    def enable_fast_reads(self) -> None:
        """The handshake is over: nothing of the greeting is left over, and its timer has been cancelled."""
        self._take = self._ahead.take_buffered

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        if self._take is not None:
            data = self._take(n)
            if data is not None:
                return data
        return super().read_all(n, check_rekey)

    def complete_handshake(self) -> None:
        if self._take is None:
            super().complete_handshake()


def connect_tcp(host: str, port: int, deadline: Deadline) -> socket.socket:
    """A connected socket with TCP_NODELAY (the second cure). Raises ``TunnelError`` with the reason."""
    where = hostkeys.format_address(host, port)
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise HostUnresolved(
            f"DNS does not know the host {printable(host)}",
            hint="check `ssh.host` for a misspelling, and that this machine is online",
        ) from error
    last: OSError = TimeoutError()
    for left, (family, kind, protocol, _, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
        if deadline.expired:
            break
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.05, deadline.remaining_s / left))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            last = error
    raise _connect_error(last, where) from last


def _connect_error(error: OSError, where: str) -> TunnelError:
    if isinstance(error, ConnectionRefusedError):
        return ConnectRefused(
            f"nothing listens on {where}",
            hint="check the port (a pod's changes when it restarts), and that the host's sshd is running",
        )
    if isinstance(error, TimeoutError):
        return ConnectTimeout(
            f"no answer from {where}", hint="the host is off, or a firewall drops the connection; check host and port"
        )
    if error.errno in _UNREACHABLE:
        return HostUnreachable(f"no route to {where}", hint="check this machine's network or VPN")
    return TunnelError(f"{where} cannot be reached: {error.strerror or type(error).__name__}")


def perform_handshake(
    sock: socket.socket | paramiko.Channel, *, host: str, port: int, deadline: Deadline, key_types: Sequence[str] = ()
) -> paramiko.Transport:
    """Exchanges keys over ``sock`` (closed on failure). ``key_types`` of host key are asked for first.

    The host's key has been proved to be the host's, not yet to be one that we trust.
    """
    carrier: Any = BufferedSocket(sock) if isinstance(sock, socket.socket) else sock
    transport = paramiko.Transport(
        carrier, packetizer_class=FastPacketizer if carrier is not sock else BoundedPacketizer
    )
    try:
        options = transport.get_security_options()
        options.ciphers = _first(FAST_CIPHERS, options.ciphers)
        options.key_types = _first(host_key_algorithms(key_types), options.key_types)
        # paramiko measures each step on its own; the deadline is for all of them.
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = max(0.1, deadline.remaining_s)
        transport.start_client(timeout=deadline.remaining_s)
        if not transport.initial_kex_done:
            raise TimeoutError
        if isinstance(transport.packetizer, FastPacketizer):
            transport.packetizer.enable_fast_reads()
    except (paramiko.SSHException, EOFError, OSError) as error:
        transport.close()
        sock.close()
        greeting = carrier.greeting if isinstance(carrier, BufferedSocket) else b"SSH-"
        raise _handshake_error(error, greeting, hostkeys.format_address(host, port), deadline) from error
    except BaseException:
        transport.close()
        sock.close()
        raise
    return transport


def _handshake_error(error: BaseException, greeting: bytes, where: str, deadline: Deadline) -> TunnelError:
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
        return TransportUnsupported(
            f"{where} and transport sshtunnel have no SSH algorithm in common ({printable(str(error))})",
            hint="use `transport: openssh`, which knows newer ones; if the host knows only old ones, update its sshd",
        )
    if b"MaxStartups" in greeting:
        return ConnectRefused(f"{where} has too many logins under way (MaxStartups)", hint="it is tried again")
    if greeting and b"SSH-" not in greeting:
        return NotSsh(
            f"{where} does not speak SSH; it said {printable(greeting, 60)!r}",
            hint="check `ssh.port`: this looks like another service",
        )
    if deadline.expired or isinstance(error, TimeoutError):
        what = "did not finish the SSH handshake" if greeting else "accepts connections, but sends no SSH greeting"
        return ConnectTimeout(f"{where} {what}", hint="the host is overloaded or hung, or this is not its SSH port")
    if not greeting:
        return ConnectRefused(
            f"{where} closed the connection before the SSH greeting",
            hint="too many logins at once (MaxStartups), a block list on the host, or its sshd is just starting",
        )
    why = printable(str(error), 120) or "closed by the host"
    return TunnelLost(
        f"the connection to {where} broke during the SSH handshake: {why}",
        hint="the network between is unstable, or what listens there is no ordinary sshd",
    )


def get_host_key(transport: paramiko.Transport) -> HostKey:
    key = transport.get_remote_server_key()
    return HostKey(key.get_name(), key.asbytes())


def perform_trusted_handshake(
    sock: socket.socket | paramiko.Channel, *, node: str, host: str, port: int, ssh: SshSpec, deadline: Deadline
) -> paramiko.Transport:
    """``perform_handshake``, and the host key checked by the node's policy. ``node`` is "" for a jump host: it is no
    node."""
    try:
        kinds = hostkeys.read_known_hosts(ssh.known_hosts).key_types(node=node, host=host, port=port)
    except BaseException:
        sock.close()
        raise
    transport = perform_handshake(sock, host=host, port=port, deadline=deadline, key_types=kinds)
    try:
        hostkeys.verify_host_key(
            get_host_key(transport),
            node=node,
            host=host,
            port=port,
            known_hosts=ssh.known_hosts,
            policy=ssh.host_key_policy,
        )
    except BaseException:
        transport.close()
        raise
    return transport


def disable_nagle(transport: paramiko.Transport, deadline: Deadline) -> paramiko.Channel | None:
    """The first cure: sshd sets TCP_NODELAY on a connection when its first command is started, so one is: the question
    whether there is a POSIX shell.

    Nobody waits for it here. The channel is to be kept until it has closed by itself; ``sessions.is_posix`` reads the
    answer. ``None`` where the host gives no session: then the tunnel works all the same, but what is sent in small
    pieces comes 40 ms late.
    """
    try:
        channel = transport.open_session(timeout=max(0.1, deadline.remaining_s))
        message = paramiko.Message()
        message.add_byte(cMSG_CHANNEL_REQUEST)
        message.add_int(channel.remote_chanid)
        message.add_string("exec")
        message.add_boolean(False)  # no answer: ``Channel.exec_command`` would wait for one without a deadline
        message.add_string(SHELL_TEST)
        send: Callable[[paramiko.Message], None] = transport._send_user_message  # type: ignore[attr-defined]
        send(message)
    except (paramiko.SSHException, EOFError, OSError):
        return None
    return channel


def list_hops(ssh: SshSpec) -> tuple[SshSpec, ...]:
    """Each host on the way to ``ssh``'s, reached through those before it; its own is the last."""
    stops = []
    for index, jump in enumerate(ssh.proxy_jump):
        user, host, port = parse_jump(jump, ssh.user)
        before = ssh.proxy_jump[:index]
        stops.append(replace(ssh, host=host, port=port, user=user, proxy_jump=before, alias=None, address_from=None))
    return (*stops, ssh)


def _first(wanted: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """``known``, with those of ``wanted`` that it has at its front."""
    front = [one for one in wanted if one in known]
    return (*front, *(one for one in known if one not in front))
