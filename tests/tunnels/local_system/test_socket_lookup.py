"""Finding a socket by its addresses: netlink, /proc, and systems that do not tell."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumesh.tunnels.local_system.peer_users import can_identify_peers
from gpumesh.tunnels.local_system.proc_net import make_address_pair
from gpumesh.tunnels.local_system.socket_lookup import ProcNet, SockDiag, SocketLookup, open_socket_lookup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture(params=[SockDiag, ProcNet])
def lookup(request: pytest.FixtureRequest) -> Iterator[SocketLookup]:
    made = request.param()
    yield made
    made.close()


@pytest.fixture
def ipv4() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(20)
        yield made


def test_a_socket_in_time_wait_has_no_inode(lookup: SocketLookup, ipv4: socket.socket) -> None:
    client = socket.create_connection(ipv4.getsockname())
    accepted, peer = ipv4.accept()
    pair = make_address_pair(peer, ipv4.getsockname(), socket.AF_INET)
    client.close()
    accepted.close()
    info = lookup(pair)
    assert info is None or info.inode == 0  # so ``find_peer_uid`` returns None


def test_sock_diag_is_preferred_to_proc(ipv4: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_socket_lookup(ipv4)
    assert isinstance(made, SockDiag)
    made.close()
    monkeypatch.setattr(SockDiag, "__call__", lambda _self, _pair: None)  # as a kernel without tcp_diag answers
    assert isinstance(open_socket_lookup(ipv4), ProcNet)
    assert can_identify_peers(ipv4)
    monkeypatch.setattr(ProcNet, "__call__", lambda _self, _pair: None)
    assert open_socket_lookup(ipv4) is None
    assert not can_identify_peers(ipv4)


def test_other_systems_have_no_lookup(ipv4: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="netlink"):
        SockDiag()
    with pytest.raises(FileNotFoundError):
        ProcNet(tmp_path)(make_address_pair(ipv4.getsockname(), None, socket.AF_INET))
