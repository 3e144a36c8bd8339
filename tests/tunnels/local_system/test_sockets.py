"""Options of connected sockets."""

from __future__ import annotations

import socket

import pytest

from gpumesh.tunnels.local_system.sockets import close_with_reset
from tests.tunnels.sshd import listener


def test_a_reset_is_a_reset() -> None:
    with listener() as local, socket.create_connection(local.getsockname()) as client:
        peer, _ = local.accept()
        close_with_reset(peer)
        client.settimeout(10)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    here, there = socket.socketpair()
    with here:
        close_with_reset(there)  # which a Unix socket does not know
        assert here.recv(1) == b""
