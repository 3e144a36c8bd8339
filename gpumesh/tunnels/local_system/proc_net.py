"""Parses the lines and the addresses in the tables of TCP sockets in /proc/net (``tcp``, ``tcp6``; Linux).

The kernel writes each 32-bit word of an address as a hexadecimal number in the machine's byte order.
"""

from __future__ import annotations

import socket
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

LISTEN_STATE = 10
"""TCP_LISTEN of the kernel's tcp_states.h."""

IPV4_MAPPED_PREFIX = bytes(10) + b"\xff\xff"
"""The first 12 bytes of an IPv6 address that stands for an IPv4 address."""


class SocketInfo(NamedTuple):
    """The kernel's data of one socket. ``state``: a number of tcp_states.h; ``uid``: the user who made the socket;
    ``inode``: 0 when no process holds the socket any more."""

    state: int
    uid: int
    inode: int


class AddressPair(NamedTuple):
    """Both ends of a connection, from the side of the socket that is looked up.

    The addresses are packed (4 or 16 bytes). A listener has zeros as its remote address and port.
    """

    family: int
    address: bytes
    port: int
    remote_address: bytes
    remote_port: int


def make_address_pair(local: tuple[str, int], remote: tuple[str, int] | None, family: int) -> AddressPair:
    """Makes a pair from addresses in the form of ``getsockname``. ``remote`` is ``None`` for a listener.

    An IPv4 address in IPv6's form becomes an IPv4 address, by which the kernel finds sockets of both families. Raises
    OSError for a text that is no address.
    """
    host, port, *_ = local
    address = socket.inet_pton(family, host)
    remote_address, remote_port = bytes(len(address)), 0
    if remote is not None:
        remote_host, remote_port, *_ = remote
        remote_address = socket.inet_pton(family, remote_host)
    if family == socket.AF_INET6 and address.startswith(IPV4_MAPPED_PREFIX):
        family = socket.AF_INET
        address = address[len(IPV4_MAPPED_PREFIX) :]
        remote_address = remote_address[len(IPV4_MAPPED_PREFIX) :]
    return AddressPair(family, address, port, remote_address, remote_port)


def map_to_ipv6(pair: AddressPair) -> AddressPair:
    """An IPv4 pair in the form of table ``tcp6``, which has the sockets of family IPv6 that talk IPv4."""
    return AddressPair(
        socket.AF_INET6,
        IPV4_MAPPED_PREFIX + pair.address,
        pair.port,
        IPV4_MAPPED_PREFIX + pair.remote_address,
        pair.remote_port,
    )


def format_table_address(address: bytes, port: int) -> bytes:
    """An address in the form of the tables: ``0100007F:1F90`` for 127.0.0.1 port 8080 on x86."""
    words = [address[start : start + 4] for start in range(0, len(address), 4)]
    digits = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
    return f"{digits}:{port:04X}".encode()


def parse_table_address(text: str) -> tuple[IPv4Address | IPv6Address, int]:
    """Parses an address in the form of the tables (see ``format_table_address``). Raises ValueError.

    An IPv4 address in IPv6's form becomes an IPv4 address.
    """
    digits, _, port = text.partition(":")
    words = [int(digits[start : start + 8], 16) for start in range(0, len(digits), 8)]
    address = ip_address(b"".join(word.to_bytes(4, sys.byteorder) for word in words))
    return unmap_ipv4(address), int(port, 16)


def unmap_ipv4(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """An IPv4 address in IPv6's form (``::ffff:127.0.0.1``) as an IPv4 address. Any other address stays as it is."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def parse_socket_info(line: bytes) -> SocketInfo:
    """Parses a line of a table. Raises ValueError and IndexError for a line of another form."""
    fields = line.split()
    state, uid, inode = fields[3], fields[7], fields[9]
    return SocketInfo(int(state, 16), int(uid), int(inode))
