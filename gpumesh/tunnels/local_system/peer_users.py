"""Which user is at the other end of a connection to a forwarded port. Asked once for each connection, at its accept.

TCP on loopback carries no credentials, but Linux knows which user made a socket: sock_diag(7) finds one by its
addresses and ports in some microseconds, however many sockets there are; /proc/net/tcp says the same, and is read to
its end. Elsewhere (macOS) nobody but root is told, so there every user of the machine can use the ports.

What is known holds for the connection that was accepted, and for no other:

- A socket that no process holds any more (closed, TIME_WAIT) belongs to nobody. The kernel shows it with inode 0, and
  with uid 0 or with that of a process that has gone: it must not pass for root's.
- Its addresses and ports may have been taken by another user's socket meanwhile. That needs our end to be closed first,
  which is looked at after the lookup.
- A uid that our user namespace does not know shows as the overflow uid, which may be a real user's as well.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gpumesh.errors import TunnelError
from gpumesh.printable import printable

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_NLMSG_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBI")  # inet_diag_req_v2 up to its socket id: family, protocol, ext, pad, states
_COOKIE = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # any interface, any cookie
_ID_SIZE = 48  # inet_diag_sockid
_COUNTERS = struct.Struct("=IIIII")  # of inet_diag_msg after its id: expires, rqueue, wqueue, uid, inode
_ALL_STATES = 0xFFFFFFFF
_LISTEN = 10
# With somebody at the other end: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING (tcp_states.h). A
# listener is found where no connection has these ports, and is another socket.
_CONNECTED = frozenset({1, 4, 5, 8, 9, 11})

REPORT_EVERY_S = 60.0  # how often a user that is refused is reported
REPORTED_USERS = 64  # at most, in that time


class SocketInfo(NamedTuple):
    """What the kernel says of one socket."""

    state: int
    uid: int
    inode: int


class AddressPair(NamedTuple):
    """The addresses of a connection, packed, and its ports; as seen from the socket that is looked for."""

    family: int
    address: bytes
    port: int
    remote_address: bytes
    remote_port: int


class SocketLookup(Protocol):
    """Finds a socket of this machine by its ends."""

    def __call__(self, ends: AddressPair) -> SocketInfo | None:
        """``None``: there is none. Raises OSError when the system does not answer."""

    def close(self) -> None: ...


class SockDiag:
    """One netlink socket, for one thread. Raises OSError where the system has none."""

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise OSError("netlink is Linux's")
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG)
        self._netlink.setblocking(False)  # the answer is there when `send` returns
        self._sequence = 0

    def __call__(self, ends: AddressPair) -> SocketInfo | None:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        request = (
            _REQUEST.pack(ends.family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES)
            + struct.pack("!HH", ends.port, ends.remote_port)
            + ends.address.ljust(16, b"\0")
            + ends.remote_address.ljust(16, b"\0")
            + _COOKIE
        )
        length = _NLMSG_HEADER.size + len(request)
        header = _NLMSG_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, self._sequence, 0)
        self._netlink.send(header + request)
        while True:
            answer = self._netlink.recv(4096)
            _length, kind, _flags, sequence, _port = _NLMSG_HEADER.unpack_from(answer)
            if sequence == self._sequence:  # else of a request before, whose answer came too late
                break
        if kind == _NLMSG_ERROR:  # ENOENT: there is none, or the kernel has no tcp_diag, which `lookup_for` finds out
            return None
        state = answer[_NLMSG_HEADER.size + 1]
        _, _, _, uid, inode = _COUNTERS.unpack_from(answer, _NLMSG_HEADER.size + 4 + _ID_SIZE)
        return SocketInfo(state, uid, inode)

    def close(self) -> None:
        self._netlink.close()


class ProcNet:
    """/proc/net/tcp and tcp6: read to the socket's line, so its cost grows with the number of sockets."""

    def __init__(self, folder: Path = Path("/proc/net")) -> None:
        self._folder = folder

    def __call__(self, ends: AddressPair) -> SocketInfo | None:
        forms = [("tcp", ends), ("tcp6", _mapped(ends))] if ends.family == socket.AF_INET else [("tcp6", ends)]
        for name, form in forms:
            wanted = b" %s %s " % (
                _as_kernel(form.address, form.port),
                _as_kernel(form.remote_address, form.remote_port),
            )
            try:
                with (self._folder / name).open("rb") as lines:
                    for line in lines:
                        if wanted in line:
                            fields = line.split()
                            return SocketInfo(int(fields[3], 16), int(fields[7]), int(fields[9]))
            except FileNotFoundError:  # a kernel without IPv6
                if name == "tcp":
                    raise
        return None

    def close(self) -> None:
        """Nothing is held."""


_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

OnPeerRefused = Callable[[int, int], None]
"""The local port, and the uid of who is not let in."""


def open_socket_lookup(listener: socket.socket) -> SocketLookup | None:
    """A way to ask who is at the other end of connections to ``listener``, tried out on the listener itself; ``None``
    where the system does not tell. Raises OSError when that cannot be found out now: no reason to let everybody in."""
    for source in (SockDiag, ProcNet):
        try:
            with ExitStack() as stack:
                lookup = source()
                stack.callback(lookup.close)
                if _knows(lookup, listener):
                    stack.pop_all()
                    return lookup
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise
    return None


def _knows(lookup: SocketLookup, listener: socket.socket) -> bool:
    try:
        found = lookup(_ends(listener.getsockname(), listener.family))
    except (ValueError, IndexError, struct.error):  # an answer in another form tells nothing either
        return False
    return found is not None and found.state == _LISTEN and bool(found.inode) and found.uid == os.geteuid()


class OwnUserFilter:
    """Lets in connections of our own user and of root, for one thread that accepts.

    ``on_refused`` is called in that thread with the local port and the uid of who was refused, at most once in
    ``REPORT_EVERY_S`` for each uid. Nothing is reported of a client that has gone already.
    """

    def __init__(
        self, lookup: SocketLookup, on_refused: OnPeerRefused, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lookup = lookup
        self._on_refused = on_refused
        self._clock = clock
        self._allowed = frozenset({0, os.geteuid()} - {overflow_uid()})
        self._reported: dict[int, float] = {}

    def allows(self, connection: socket.socket, peer: Any) -> bool:
        """``peer`` is the address that ``accept`` gave. A Unix socket's mode has already decided."""
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return True
        uid = self.find_peer_uid(connection, peer)
        if uid in self._allowed:
            return True
        if uid is not None:
            self._report(connection, uid)
        return False

    def find_peer_uid(self, connection: socket.socket, peer: Any) -> int | None:
        """Of the user who made the socket at the other end; ``None`` when nobody holds it any more."""
        try:
            found = self._find(_ends(peer, connection.family, connection.getsockname()))
            connection.getpeername()  # raises when our end is closed: then another socket may have these ports by now
        except OSError:
            return None
        return found.uid if found is not None and found.inode and found.state in _CONNECTED else None

    def close(self) -> None:
        self._lookup.close()

    def _find(self, ends: AddressPair) -> SocketInfo | None:
        try:
            return self._lookup(ends)
        except OSError:  # netlink's buffers are full, or out of memory
            return ProcNet()(ends)

    def _report(self, connection: socket.socket, uid: int) -> None:
        now = self._clock()
        self._reported = {user: at for user, at in self._reported.items() if now - at < REPORT_EVERY_S}
        if uid not in self._reported and len(self._reported) < REPORTED_USERS:
            self._reported[uid] = now
            with suppress(OSError):
                self._on_refused(connection.getsockname()[1], uid)


def can_identify_peers(listener: socket.socket) -> bool:
    """Whether the system tells whose the connections to ``listener`` are. Raises OSError as ``open_socket_lookup``
    does."""
    lookup = open_socket_lookup(listener)
    if lookup is not None:
        lookup.close()
    return lookup is not None


def open_own_user_filter(listener: socket.socket, on_refused: OnPeerRefused) -> OwnUserFilter | None:
    """For connections to ``listener``; ``None`` for a Unix socket, whose mode decides, and where no system tells.

    Raises TunnelError where it could be told, and is not now: what is to be kept to us is not opened to all.
    """
    if listener.family == socket.AF_UNIX or sys.platform != "linux":
        return None
    reason = "this system does not say"
    try:
        lookup = open_socket_lookup(listener)
    except OSError as error:
        lookup, reason = None, os.strerror(error.errno or 0)
    if lookup is None:
        raise TunnelError(f"whose connections come to the local port cannot be told: {reason}")
    return OwnUserFilter(lookup, on_refused)


def find_user_name(uid: int) -> str | None:
    """Safe to print; blocks, where a directory service is asked."""
    import pwd  # POSIX only

    try:
        return printable(pwd.getpwuid(uid).pw_name, 64)
    except KeyError:
        return None


def overflow_uid() -> int | None:
    """The uid by which this process sees users that its user namespace does not know; ``None``: it knows all."""
    try:
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if ranges == [["0", "0", "4294967295"]]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 65534


def _ends(peer: Any, family: int, far: Any = None) -> AddressPair:
    """Of the socket at ``peer``; a listener has no far end. An IPv4 address in IPv6's form is one of IPv4, by which the
    kernel finds sockets of both kinds."""
    address = socket.inet_pton(family, peer[0])
    far_address = bytes(len(address)) if far is None else socket.inet_pton(family, far[0])
    if family == socket.AF_INET6 and address.startswith(_MAPPED):
        family, address, far_address = socket.AF_INET, address[12:], far_address[12:]
    return AddressPair(family, address, peer[1], far_address, 0 if far is None else far[1])


_MAPPED = bytes(10) + b"\xff\xff"


def _mapped(ends: AddressPair) -> AddressPair:
    return AddressPair(
        socket.AF_INET6, _MAPPED + ends.address, ends.port, _MAPPED + ends.remote_address, ends.remote_port
    )


def _as_kernel(address: bytes, port: int) -> bytes:
    """/proc/net/tcp writes each 32-bit word of an address as a hexadecimal number of the machine's byte order."""
    words = (address[start : start + 4] for start in range(0, len(address), 4))
    return b"%s:%04X" % ("".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words).encode(), port)
