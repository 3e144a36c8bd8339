"""Finds a socket of this machine by its addresses and ports: its state and the user who made it (Linux).

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
_NLMSG_ERROR = 2
_NLMSG_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBI")  # inet_diag_req_v2 up to its socket id: family, protocol, ext, pad, states
_COOKIE = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # any interface, any cookie
_ID_SIZE = 48  # inet_diag_sockid
_COUNTERS = struct.Struct("=IIIII")  # of inet_diag_msg after its id: expires, rqueue, wqueue, uid, inode
_ALL_STATES = 0xFFFFFFFF

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


class SocketLookup(Protocol):
    """Finds a socket of this machine."""

    def __call__(self, pair: AddressPair) -> SocketInfo | None:
        """``None``: there is no such socket. Raises OSError when the system does not answer."""

    def close(self) -> None: ...


class SockDiag:
    """Asks the kernel over one netlink socket. Only one thread may use it. The constructor raises OSError where the
    system has no netlink."""

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise OSError("only Linux has netlink")
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG)
        self._netlink.setblocking(False)  # the kernel answers before ``send`` returns
        self._sequence = 0

    def __call__(self, pair: AddressPair) -> SocketInfo | None:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        request = (
            _REQUEST.pack(pair.family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES)
            + struct.pack("!HH", pair.port, pair.remote_port)
            + pair.address.ljust(16, b"\0")
            + pair.remote_address.ljust(16, b"\0")
            + _COOKIE
        )
        length = _NLMSG_HEADER.size + len(request)
        header = _NLMSG_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, self._sequence, 0)
        self._netlink.send(header + request)
        while True:
            answer = self._netlink.recv(4096)
            _length, kind, _flags, sequence, _port = _NLMSG_HEADER.unpack_from(answer)
            if sequence == self._sequence:  # an answer to an earlier request is skipped
                break
        if kind == _NLMSG_ERROR:  # ENOENT: no such socket, or no tcp_diag in the kernel (see ``open_socket_lookup``)
            return None
        state = answer[_NLMSG_HEADER.size + 1]
        _, _, _, uid, inode = _COUNTERS.unpack_from(answer, _NLMSG_HEADER.size + 4 + _ID_SIZE)
        return SocketInfo(state, uid, inode)

    def close(self) -> None:
        self._netlink.close()


class ProcNet:
    """Reads /proc/net/tcp and tcp6 up to the socket's line. The cost grows with the number of sockets of the
    machine."""

    def __init__(self, folder: Path = Path("/proc/net")) -> None:
        self._folder = folder

    def __call__(self, pair: AddressPair) -> SocketInfo | None:
        forms = [("tcp", pair), ("tcp6", map_to_ipv6(pair))] if pair.family == socket.AF_INET else [("tcp6", pair)]
        for name, form in forms:
            addresses = b" %s %s " % (
                format_table_address(form.address, form.port),
                format_table_address(form.remote_address, form.remote_port),
            )
            try:
                with (self._folder / name).open("rb") as lines:
                    for line in lines:
                        if addresses in line:
                            return parse_socket_info(line)
            except FileNotFoundError:  # a kernel without IPv6
                if name == "tcp":
                    raise
        return None

    def close(self) -> None:
        """Does nothing: no file stays open between two look-ups."""


def open_socket_lookup(listener: socket.socket) -> SocketLookup | None:
    """A lookup for the peers of ``listener``. It is first tried on the listener itself. ``None``: no lookup works on
    this system.

    Raises OSError when descriptors or memory are short, so that the trial is not possible now. The caller must not take
    that for a system without lookups, and let every user in.
    """
    for make_lookup in (SockDiag, ProcNet):
        try:
            with ExitStack() as stack:
                lookup = make_lookup()
                stack.callback(lookup.close)
                if _finds_listener(lookup, listener):
                    stack.pop_all()
                    return lookup
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise
    return None


def _finds_listener(lookup: SocketLookup, listener: socket.socket) -> bool:
    try:
        info = lookup(make_address_pair(listener.getsockname(), None, listener.family))
    except (ValueError, IndexError, struct.error):  # an answer in a form that we do not know
        return False
    return info is not None and info.state == LISTEN_STATE and bool(info.inode) and info.uid == os.geteuid()
