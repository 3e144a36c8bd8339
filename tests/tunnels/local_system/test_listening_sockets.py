"""The list of this machine's listening sockets: netlink, /proc, and systems that have only one of them."""

from __future__ import annotations

import os
import socket
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

from gpumesh.tunnels.local_system.listening_sockets import (
    ListeningSocket,
    list_listening_sockets,
    read_listening_sockets,
)
from gpumesh.tunnels.local_system.socket_lookup import SockDiag

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def ipv6_server(host: str, *, dual: bool = False) -> socket.socket:
    return socket.create_server((host, 0), family=socket.AF_INET6, dualstack_ipv6=dual)


def test_both_ways_list_the_same_sockets() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as ipv4,
        ipv6_server("::1") as ipv6,
        ipv6_server("::", dual=True) as dual,
        ipv6_server("::ffff:127.0.0.1", dual=True) as mapped,
        socket.create_connection(ipv4.getsockname()),  # a connection, which is not listed
    ):
        expected = {
            ListeningSocket(ip_address(host), server.getsockname()[1], os.fstat(server.fileno()).st_ino, os.geteuid())
            for host, server in (("127.0.0.1", ipv4), ("::1", ipv6), ("::", dual), ("127.0.0.1", mapped))
        }
        own = {entry.inode for entry in expected}
        for listed in (list_listening_sockets(), read_listening_sockets(Path("/proc"))):
            assert {entry for entry in listed if entry.inode in own} == expected


def test_many_sockets_come_in_several_answers() -> None:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(400)]  # about 30 KiB of answers
    try:
        ports = {entry.port for entry in list_listening_sockets()}
        assert ports >= {server.getsockname()[1] for server in servers}
    finally:
        for server in servers:
            server.close()


@pytest.mark.parametrize("answer", [OSError("no netlink"), ValueError("another form"), None])
def test_without_sock_diag_the_list_comes_from_proc(answer: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def list_listening(_self: SockDiag) -> list[object]:
        if answer is not None:
            raise answer
        return []  # as from a kernel without tcp_diag

    monkeypatch.setattr(SockDiag, "list_listening", list_listening)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert server.getsockname()[1] in {entry.port for entry in list_listening_sockets()}


def test_malformed_lines_of_proc_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 77 1 x 100"
    (tmp_path / "net" / "tcp").write_text(f"heading\nshort 0A line\n{line}\n{line.replace('0100007F', 'zz')}\n")
    assert list(read_listening_sockets(tmp_path)) == [ListeningSocket(ip_address("127.0.0.1"), 8080, 77, 1000)]
