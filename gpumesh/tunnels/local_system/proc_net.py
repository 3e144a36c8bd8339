"""Parses the tables of TCP sockets in /proc/net (``tcp``, ``tcp6``; Linux): their lines, and their form of addresses.

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
    """The kernel's data of one socket. ``inode`` is 0 when no process holds the socket any more."""

    state: int
    uid: int
    inode: int


class AddressPair(NamedTuple):
    """A connection's packed addresses and its ports, from the side of the socket that is looked up. A listener has
    zeros as its remote address and port."""

    family: int
    address: bytes
    port: int
    remote_address: bytes
    remote_port: int


def make_address_pair(local: tuple[str, int], remote: tuple[str, int] | None, family: int) -> AddressPair:
    """Makes a pair from addresses in the form of ``getsockname``. ``remote`` is ``None`` for a listener.

    An IPv4 address in IPv6's form becomes an IPv4 address, because the kernel finds sockets of both families by it.
    Raises OSError for a text that is no address.
    """
    address = socket.inet_pton(family, local[0])
    remote_address = bytes(len(address)) if remote is None else socket.inet_pton(family, remote[0])
    if family == socket.AF_INET6 and address.startswith(IPV4_MAPPED_PREFIX):
        family, address, remote_address = socket.AF_INET, address[12:], remote_address[12:]
    return AddressPair(family, address, local[1], remote_address, 0 if remote is None else remote[1])


def map_to_ipv6(pair: AddressPair) -> AddressPair:
    """An IPv4 pair in the form of ``tcp6``, where sockets of family IPv6 stand that talk IPv4."""
    return AddressPair(
        socket.AF_INET6,
        IPV4_MAPPED_PREFIX + pair.address,
        pair.port,
        IPV4_MAPPED_PREFIX + pair.remote_address,
        pair.remote_port,
    )


def format_table_address(address: bytes, port: int) -> bytes:
    """An address in the form of the tables: ``0100007F:1F90`` for 127.0.0.1 port 8080 on x86."""
    words = (address[start : start + 4] for start in range(0, len(address), 4))
    return b"%s:%04X" % ("".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words).encode(), port)


def parse_table_address(text: str) -> tuple[IPv4Address | IPv6Address, int]:
    """The reverse of ``format_table_address``. An IPv4 address in IPv6's form becomes an IPv4 address. Raises
    ValueError."""
    digits, _, port = text.partition(":")
    raw = b"".join(int(digits[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(digits), 8))
    address = ip_address(raw)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address, int(port, 16)


def parse_socket_info(line: bytes) -> SocketInfo:
    """State, user and inode of a table's line. Raises ValueError and IndexError for a line of another form."""
    fields = line.split()
    return SocketInfo(int(fields[3], 16), int(fields[7]), int(fields[9]))
