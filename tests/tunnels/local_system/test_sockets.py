"""Options of connected sockets."""

from __future__ import annotations

import socket

import pytest

from gpumesh.tunnels.local_system.sockets import close_with_reset
from tests.tunnels.sshd import listener


def test_close_with_reset_sends_a_reset() -> None:
    with listener() as local, socket.create_connection(local.getsockname()) as client:
        peer, _ = local.accept()
        close_with_reset(peer)
        client.settimeout(10)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    here, there = socket.socketpair()
    with here:
        close_with_reset(there)  # a Unix socket has no reset
        assert here.recv(1) == b""
