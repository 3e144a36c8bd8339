"""Connects to an SSH host with paramiko, exchanges keys and checks the host's key; exact errors. Blocking.

sshtunnel does not connect by itself: it gets a finished transport (sshtunnel_connector.py has the reason).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from typing import Any

import paramiko
from paramiko.common import cMSG_CHANNEL_REQUEST

from gpumesh.errors import (
    ConnectRefused,
    ConnectTimeout,
    HostUnreachable,
    HostUnresolved,
    TransportUnsupported,
    TunnelError,
    TunnelLost,
)
from gpumesh.text.addresses import format_address
from gpumesh.text.printable import printable
from gpumesh.topology import SshSpec
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.hostkeys import host_key_algorithms, verify_host_key
from gpumesh.tunnels.inprocess.host_transport import HostTransport
from gpumesh.tunnels.inprocess.packetizer import BoundedPacketizer, BufferedSocket, FastPacketizer
from gpumesh.tunnels.known_hosts import HostKey, KnownHost, read_known_hosts
from gpumesh.tunnels.local_system.sockets import disable_nagle
from gpumesh.tunnels.remote_commands.host_text import add_host_text, error_from_greeting
from gpumesh.tunnels.remote_commands.remote_command import SHELL_TEST

FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")  # a third less delay than CTR with HMAC
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EADDRNOTAVAIL)


def connect_tcp(host: str, port: int, deadline: Deadline) -> socket.socket:
    """Connects to the first address of ``host`` that answers, and returns the socket. Raises ``TunnelError``.

    The socket has TCP_NODELAY: without that option small packets wait.
    """
    address_text = format_address(host, port)
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise HostUnresolved(
            f"DNS does not know the host {printable(host)}",
            hint="check `ssh.host` for a misspelling, and that this machine is online",
        ) from error
    last_error: OSError = TimeoutError()  # stays if the deadline has expired already
    for index, (family, socket_type, protocol, _name, address) in enumerate(addresses):
        if deadline.expired:
            break
        sock = socket.socket(family, socket_type, protocol)
        try:
            # Each address gets an equal share of the time that is left: a silent address leaves time for the others.
            # At least 0.05 s: a time-out of 0 would make the socket non-blocking.
            sock.settimeout(max(0.05, deadline.remaining_s / (len(addresses) - index)))
            sock.connect(address)
            disable_nagle(sock)
            return sock
        except OSError as error:
            sock.close()
            last_error = error
    raise _connect_error(last_error, address_text) from last_error


def _connect_error(error: OSError, address: str) -> TunnelError:
    """The error for a TCP connection that could not be made."""
    if isinstance(error, ConnectionRefusedError):
        return ConnectRefused(
            f"nothing listens on {address}",
            hint="check the port (a pod's changes when it restarts), and that the host's sshd is running",
        )
    if isinstance(error, TimeoutError):
        return ConnectTimeout(
            f"no answer from {address}", hint="the host is off, or a firewall drops the connection; check host and port"
        )
    if error.errno in _UNREACHABLE:
        return HostUnreachable(f"no route to {address}", hint="check this machine's network or VPN")
    return TunnelError(f"{address} cannot be reached: {error.strerror or type(error).__name__}")


def perform_handshake(
    sock: socket.socket | paramiko.Channel, *, host: str, port: int, deadline: Deadline, key_types: Sequence[str] = ()
) -> paramiko.Transport:
    """Exchanges keys with the host over ``sock``, and returns the transport. A failure closes ``sock``.

    Afterwards the host has proved that it owns its key; the caller checks whether the key is trusted. The host is asked
    for a key of ``key_types`` first. Raises TunnelError.
    """
    stream: Any = sock
    packetizer_class: type[BoundedPacketizer] = BoundedPacketizer
    if isinstance(sock, socket.socket):  # otherwise a channel through a jump host
        stream = BufferedSocket(sock)
        packetizer_class = FastPacketizer
    transport = HostTransport(stream, packetizer_class=packetizer_class)
    try:
        options = transport.get_security_options()
        options.ciphers = _move_to_front(FAST_CIPHERS, options.ciphers)
        options.key_types = _move_to_front(host_key_algorithms(key_types), options.key_types)
        # paramiko has a time-out for each step; our deadline is for all steps together.
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = max(0.1, deadline.remaining_s)
        transport.start_client(timeout=deadline.remaining_s)
        if not transport.initial_kex_done:  # ``start_client`` returned because of its time-out
            raise TimeoutError
        if isinstance(transport.packetizer, FastPacketizer):
            transport.packetizer.enable_fast_reads()
    except (paramiko.SSHException, EOFError, OSError) as error:
        transport.close()
        sock.close()
        # Behind a jump host the greeting is not known here. Then it is taken for the greeting of an SSH server.
        greeting = stream.greeting if isinstance(stream, BufferedSocket) else b"SSH-"
        tunnel_error = _handshake_error(error, greeting, format_address(host, port), deadline)
        raise add_host_text(tunnel_error, transport.host_lines) from error
    except BaseException:  # a bug of ours, or the end of the process
        transport.close()
        sock.close()
        raise
    return transport


def _handshake_error(error: BaseException, greeting: bytes, address: str, deadline: Deadline) -> TunnelError:
    """The error for a failed handshake. ``greeting``: the first bytes from the host; empty: the host sent nothing."""
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
        return TransportUnsupported(
            f"{address} and transport sshtunnel have no SSH algorithm in common ({printable(str(error))})",
            hint="use `transport: openssh`, which knows newer ones; if the host knows only old ones, update its sshd",
        )
    if greeting and b"SSH-" not in greeting:
        return error_from_greeting(greeting, address)
    if deadline.expired or isinstance(error, TimeoutError):
        symptom = "did not finish the SSH handshake" if greeting else "accepts connections, but sends no SSH greeting"
        return ConnectTimeout(
            f"{address} {symptom}", hint="the host is overloaded or hung, or this is not its SSH port"
        )
    if not greeting:
        return ConnectRefused(
            f"{address} closed the connection before the SSH greeting",
            hint="too many logins at once (MaxStartups), a block list on the host, or its sshd is just starting",
        )
    reason = printable(str(error), 120) or "closed by the host"
    return TunnelLost(
        f"the connection to {address} broke during the SSH handshake: {reason}",
        hint="the network between is unstable, or what listens there is no ordinary sshd",
    )


def get_host_key(transport: paramiko.Transport) -> HostKey:
    """The key of the host at the other end. The host has proved that it owns this key."""
    key = transport.get_remote_server_key()
    return HostKey(key.get_name(), key.asbytes())


def perform_trusted_handshake(
    sock: socket.socket | paramiko.Channel, host: KnownHost, *, ssh: SshSpec, deadline: Deadline
) -> paramiko.Transport:
    """Calls ``perform_handshake``, checks the host's key by the policy of ``ssh``, and returns the transport.

    A failure, also a key that is not trusted, closes ``sock`` and raises TunnelError.
    """
    try:
        key_types = read_known_hosts(*ssh.known_hosts_files).key_types(host)
    except BaseException:
        sock.close()
        raise
    transport = perform_handshake(sock, host=host.host, port=host.port, deadline=deadline, key_types=key_types)
    try:
        verify_host_key(
            get_host_key(transport),
            host,
            known_hosts=ssh.known_hosts,
            more_known_hosts=ssh.more_known_hosts,
            policy=ssh.host_key_policy,
        )
    except BaseException:
        transport.close()  # closes ``sock`` too
        raise
    return transport


def start_shell_test(transport: paramiko.Transport, deadline: Deadline) -> paramiko.Channel | None:
    """Starts a command on the host that tests for a POSIX shell. It also turns Nagle's algorithm off there: sshd sets
    TCP_NODELAY on a connection when its first command starts.

    Returns the command's channel at once: ``sessions.has_posix_shell`` reads the result. The caller
    must keep the channel until it has closed by itself, because paramiko closes a channel that is garbage-collected,
    perhaps in the middle of the test. ``None``: the host gives no session. Then the tunnel still works, but an answer
    in small pieces comes up to 40 ms late.
    """
    try:
        channel = transport.open_session(timeout=max(0.1, deadline.remaining_s))
        message = paramiko.Message()
        message.add_byte(cMSG_CHANNEL_REQUEST)
        message.add_int(channel.remote_chanid)
        message.add_string("exec")
        message.add_boolean(False)  # no answer: ``Channel.exec_command`` would wait for it without a deadline
        message.add_string(SHELL_TEST)
        send: Callable[[paramiko.Message], None] = transport._send_user_message  # type: ignore[attr-defined]
        send(message)
    except (paramiko.SSHException, EOFError, OSError):  # the host refuses, or does not answer in time
        return None
    return channel


def _move_to_front(preferred: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Returns ``names`` with the preferred names first, in the order of ``preferred``. Adds no name."""
    front = [name for name in preferred if name in names]
    return (*front, *(name for name in names if name not in front))
