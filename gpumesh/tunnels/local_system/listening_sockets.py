"""Lists the listening TCP sockets of this machine: by sock_diag(7), or from /proc/net (Linux).

/proc/net/tcp also holds all connections, and the kernel walks through its whole table of them to write the file. That
takes some milliseconds of CPU time at each probe; sock_diag lists only the listening sockets, in some microseconds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import NamedTuple

from gpumesh.tunnels.local_system.proc_net import LISTEN_STATE, parse_socket_info, parse_table_address, unmap_ipv4
from gpumesh.tunnels.local_system.socket_lookup import SockDiag


class ListeningSocket(NamedTuple):
    """``address`` and ``port`` are those to which the socket is bound. ``inode`` identifies the socket, ``uid`` the
    user who made it."""

    address: IPv4Address | IPv6Address
    port: int
    inode: int
    uid: int


def list_listening_sockets() -> list[ListeningSocket]:
    """All listening TCP sockets; empty on systems without netlink and /proc. Blocks for less than a millisecond with
    netlink, and for some milliseconds with /proc."""
    try:
        with closing(SockDiag()) as sock_diag:
            sockets = [
                ListeningSocket(unmap_ipv4(ip_address(address)), port, info.inode, info.uid)
                for address, port, info in sock_diag.list_listening()
            ]
    except (OSError, ValueError, struct.error):  # no netlink, or an answer in a form that we do not know
        sockets = []
    return sockets or list(read_listening_sockets(Path("/proc")))  # a kernel without tcp_diag lists nothing


def read_listening_sockets(proc: Path) -> Iterator[ListeningSocket]:
    """Yields the listening sockets in the tables of /proc/net. ``proc``: the folder /proc. Skips malformed lines."""
    for table in ("net/tcp", "net/tcp6"):
        try:
            lines = (proc / table).read_bytes().splitlines()[1:]  # without the heading
        except OSError:  # there is no such table: no IPv6, or no Linux
            continue
        for line in lines:
            # A quick check for LISTEN_STATE (0A), because most lines are connections. The state is parsed below.
            if b" 0A " not in line:
                continue
            try:
                info = parse_socket_info(line)
                address, port = parse_table_address(line.split()[1].decode())
            except (ValueError, IndexError):  # a line of another form
                continue
            if info.state == LISTEN_STATE:
                yield ListeningSocket(address, port, info.inode, info.uid)
