"""Finds a socket of this machine by its addresses and ports, and returns its state, user and inode (Linux).

TCP on loopback carries no credentials, but the kernel knows which user made a socket. sock_diag(7) finds a socket by
its addresses in some microseconds, however many sockets there are. /proc/net/tcp has the same data, but has to be read
line by line. Other systems (macOS) show this to root only.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from gpumesh.tunnels.local_system.proc_net import (
    LISTEN_STATE,
    AddressPair,
    SocketInfo,
    format_table_address,
    make_address_pair,
    map_to_ipv6,
    parse_socket_info,
)

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLM_F_DUMP = 0x300  # all sockets that match, not one
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_DUMP_BYTES = 1 << 16  # the kernel sends at most 32 KiB at once
_NLMSG_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
# The structs of linux/inet_diag.h. A request (inet_diag_req_v2) begins with family, protocol, ext, pad, states. Then
# comes the socket id (inet_diag_sockid): ports, addresses, interface, cookie.
_REQUEST = struct.Struct("=BBBBI")
_ANY_INTERFACE_AND_COOKIE = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
# An answer (inet_diag_msg) begins with family, state, timer, retrans (a byte each). Then come the socket id, and the
# counters: expires, rqueue, wqueue, uid, inode.
_ANSWER_START = struct.Struct("=BBBB")
_ID_SIZE = 48
_PORTS = struct.Struct("!HH")  # the begin of a socket id; the local address follows
_COUNTERS = struct.Struct("=IIIII")
_ALL_STATES = 0xFFFFFFFF

# The errors of a system that is short of descriptors or memory now.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


def _parse_answer(answer: bytes, start: int) -> SocketInfo:
    """The data of a socket in an ``inet_diag_msg`` that begins at ``start``."""
    _family, state, _timer, _retrans = _ANSWER_START.unpack_from(answer, start)
    _expires, _rqueue, _wqueue, uid, inode = _COUNTERS.unpack_from(answer, start + _ANSWER_START.size + _ID_SIZE)
    return SocketInfo(state, uid, inode)


class SocketLookup(Protocol):
    """A way to find a socket of this machine: call the lookup with the socket's addresses and ports."""

    def __call__(self, pair: AddressPair) -> SocketInfo | None:
        """Returns the socket's data; ``None``: there is no such socket. Raises OSError when the system does not
        answer."""

    def close(self) -> None: ...


class SockDiag:
    """A ``SocketLookup`` that asks the kernel over a netlink socket. Only one thread may use an object of this class.

    The constructor raises OSError where the system has no netlink.
    """

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise OSError("only Linux has netlink")
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG)
        self._netlink.setblocking(False)  # the kernel answers before ``send`` returns
        self._sequence = 0  # of the last request to the kernel

    def __call__(self, pair: AddressPair) -> SocketInfo | None:
        socket_id = (
            struct.pack("!HH", pair.port, pair.remote_port)
            + pair.address.ljust(16, b"\0")
            + pair.remote_address.ljust(16, b"\0")
            + _ANY_INTERFACE_AND_COOKIE
        )
        self._send(_NLM_F_REQUEST, _REQUEST.pack(pair.family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES) + socket_id)
        while True:
            answer = self._netlink.recv(4096)
            _length, answer_type, _flags, sequence, _port = _NLMSG_HEADER.unpack_from(answer)
            if sequence == self._sequence:
                break
            # Otherwise it was the answer to an earlier request, which is skipped.
        if answer_type == _NLMSG_ERROR:
            # ENOENT: there is no such socket. A kernel without tcp_diag says this of every socket; the trial in
            # ``open_socket_lookup`` finds that out.
            return None
        return _parse_answer(answer, _NLMSG_HEADER.size)

    def list_listening(self) -> Iterator[tuple[bytes, int, SocketInfo]]:
        """Yields the packed address, the port and the data of each listening TCP socket.

        Raises OSError when the kernel refuses the question, ValueError and struct.error for an answer in an unknown
        form.
        """
        for family, address_size in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
            # A set of states has a bit for each state. A socket id of zeros: sockets with any address and port.
            listening = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << LISTEN_STATE) + bytes(_ID_SIZE)
            self._send(_NLM_F_REQUEST | _NLM_F_DUMP, listening)
            for message in self._receive_dump():
                port, _remote_port = _PORTS.unpack_from(message, _ANSWER_START.size)
                address_start = _ANSWER_START.size + _PORTS.size
                yield message[address_start : address_start + address_size], port, _parse_answer(message, 0)

    def _send(self, flags: int, request: bytes) -> None:
        """Sends a request with a new sequence number, by which its answer is known."""
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        length = _NLMSG_HEADER.size + len(request)
        header = _NLMSG_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, flags, self._sequence, 0)  # port 0: not needed
        self._netlink.send(header + request)

    def _receive_dump(self) -> Iterator[bytes]:
        """Yields the content of each message in the answer to a question with many answers."""
        while True:
            data = self._netlink.recv(_DUMP_BYTES)
            start = 0
            while start < len(data):
                length, message_type, _flags, sequence, _port = _NLMSG_HEADER.unpack_from(data, start)
                message = data[start + _NLMSG_HEADER.size : start + length]
                if length < _NLMSG_HEADER.size or sequence != self._sequence:
                    raise ValueError("not the answer to this question")
                if message_type == _NLMSG_ERROR:
                    raise OSError("the kernel lists no sockets")
                if message_type == _NLMSG_DONE:
                    return
                yield message
                start += (length + 3) & ~3  # each message begins at a multiple of 4 bytes

    def close(self) -> None:
        self._netlink.close()


class ProcNet:
    """A ``SocketLookup`` that reads /proc/net/tcp and tcp6 up to the socket's line.

    Its cost grows with the number of sockets of the machine.
    """

    def __init__(self, folder: Path = Path("/proc/net")) -> None:
        self._folder = folder

    def __call__(self, pair: AddressPair) -> SocketInfo | None:
        if pair.family != socket.AF_INET:
            return self._search_table("tcp6", pair)
        info = self._search_table("tcp", pair)
        if info is not None:
            return info
        # A program may have made this IPv4 connection with a socket of family IPv6.
        return self._search_table("tcp6", map_to_ipv6(pair))

    def _search_table(self, name: str, pair: AddressPair) -> SocketInfo | None:
        """The socket with these addresses in the table ``name`` of /proc/net; ``None``: it has no such socket."""
        local = format_table_address(pair.address, pair.port)
        remote = format_table_address(pair.remote_address, pair.remote_port)
        addresses = b" %s %s " % (local, remote)
        try:
            with (self._folder / name).open("rb") as lines:
                for line in lines:
                    if addresses in line:
                        return parse_socket_info(line)
        except FileNotFoundError:
            if name == "tcp":  # a missing tcp6 only means a kernel without IPv6
                raise
        return None

    def close(self) -> None:
        """Does nothing: no file stays open between two look-ups."""


def open_socket_lookup(listener: socket.socket) -> SocketLookup | None:
    """Opens a lookup for the peers of ``listener``, after a trial on the listener itself; ``None``: no lookup works.

    Raises OSError when descriptors or memory are short, so that the trial is not possible now. The caller must not take
    this for a system without lookups, because then every user would be let in.
    """
    for make_lookup in (SockDiag, ProcNet):
        try:
            with ExitStack() as stack:
                lookup = make_lookup()
                stack.callback(lookup.close)
                if _finds_listener(lookup, listener):
                    stack.pop_all()  # the lookup stays open
                    return lookup
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise
            # Otherwise this system does not have this lookup.
    return None


def _finds_listener(lookup: SocketLookup, listener: socket.socket) -> bool:
    """Whether the lookup finds ``listener`` and shows it as what it is: listening, open, and ours. Raises OSError."""
    try:
        info = lookup(make_address_pair(listener.getsockname(), None, listener.family))
    except (ValueError, IndexError, struct.error):  # an answer in a form that we do not know
        return False
    if info is None or info.inode == 0:  # inode 0: a socket that no process holds
        return False
    return info.state == LISTEN_STATE and info.uid == os.geteuid()
