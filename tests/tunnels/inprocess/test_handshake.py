"""Connecting to an address: each address of a name is tried within the deadline."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from gpumesh.errors import ConnectRefused, ConnectTimeout
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.inprocess.handshake import connect_tcp
from tests.tunnels.sshd import listener

# -- sockets ---------------------------------------------------------------------------------------------------------


def addresses(*ports: int) -> list[tuple[object, ...]]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_the_next_address_is_tried_when_one_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a name with an IPv6 address that leads nowhere."""
    with listener() as alive:
        ports = closed_port(), alive.getsockname()[1]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses(*ports))
        with connect_tcp("gpu", 22, Deadline(10.0, time.monotonic)) as sock:
            assert sock.getpeername()[1] == ports[1]
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_last_error_is_raised_when_no_address_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses(closed_port(), closed_port()))
    with pytest.raises(ConnectRefused, match="gpu:2222") as caught:
        connect_tcp("gpu", 2222, Deadline(10.0, time.monotonic))
    assert caught.value.hint


def test_an_address_that_never_answers_gets_its_share_of_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as hole, contextlib.ExitStack() as stack, listener() as alive:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        port = hole.getsockname()[1]
        for _ in range(4):  # until its queue is full: then it drops what comes
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filling.connect(("127.0.0.1", port))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses(port, alive.getsockname()[1]))
        deadline = Deadline(1.0, time.monotonic)
        with connect_tcp("gpu", 22, deadline):
            assert not deadline.expired
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses(port, port, port))
        with pytest.raises(ConnectTimeout, match="gpu"):
            connect_tcp("gpu", 22, Deadline(0.3, time.monotonic))
