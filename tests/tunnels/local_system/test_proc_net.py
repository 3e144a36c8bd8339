"""Addresses as /proc/net/tcp writes them."""

from __future__ import annotations

import socket
import sys
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.tunnels.local_system.proc_net import (
    format_table_address,
    make_address_pair,
    map_to_ipv6,
    parse_socket_info,
    parse_table_address,
)


@pytest.mark.skipif(sys.byteorder != "little", reason="the texts are those of a little-endian machine")
def test_addresses_of_a_little_endian_machine() -> None:
    assert format_table_address(socket.inet_aton("127.0.0.1"), 8080) == b"0100007F:1F90"
    assert parse_table_address("0100007F:1F90") == (ip_address("127.0.0.1"), 8080)


@given(st.ip_addresses(), st.integers(0, 65535))
def test_an_address_survives_formatting_and_parsing(address: object, port: int) -> None:
    parsed, parsed_port = parse_table_address(format_table_address(address.packed, port).decode())  # type: ignore[attr-defined]
    assert parsed_port == port
    assert parsed == (getattr(address, "ipv4_mapped", None) or address)


def test_an_ipv4_address_in_ipv6_form_is_one_of_ipv4() -> None:
    pair = make_address_pair(("::ffff:127.0.0.1", 5), ("::ffff:127.0.0.2", 6), socket.AF_INET6)
    assert pair == make_address_pair(("127.0.0.1", 5), ("127.0.0.2", 6), socket.AF_INET)
    assert parse_table_address(format_table_address(map_to_ipv6(pair).address, 5).decode())[0] == ip_address(
        "127.0.0.1"
    )


def test_a_line_of_another_form_raises() -> None:
    line = b"  0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000 0 77 1"
    assert parse_socket_info(line) == (10, 1000, 77)
    with pytest.raises(IndexError):
        parse_socket_info(b"  0: 0100007F:1F90")
    with pytest.raises(ValueError):
        parse_table_address("no address")
