"""The permanent local ends: bound once, holding or resetting clients while there is no worker."""

from __future__ import annotations

import asyncio
import resource
import socket

import pytest

from gpumesh.topology import Target
from gpumesh.tunnels.listeners import Listeners
from tests.tunnels.polling import wait_until
from tests.tunnels.supervised import descriptors
from tests.tunnels.traffic import exchange

TWO = (Target("127.0.0.1", 80), Target("::1", 443, "https", "/api/"))


def test_each_target_has_a_port_of_its_own_on_loopback() -> None:
    listeners = Listeners(TWO)
    first, second = listeners.ports
    assert first != second
    assert [listener.getsockname()[0] for listener in listeners.sockets] == ["127.0.0.1"] * 2
    assert listeners.urls == {TWO[0]: f"http://127.0.0.1:{first}", TWO[1]: f"https://127.0.0.1:{second}/api"}
    listeners.close()
    listeners.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", first))


async def test_clients_wait_are_reset_and_wait_again() -> None:
    listeners = Listeners(TWO)
    loop = asyncio.get_running_loop()
    waiting = [asyncio.create_task(exchange(port, b"x" * 100_000)) for port in listeners.ports for _ in range(100)]
    await asyncio.sleep(0.05)  # nothing may happen in this time
    assert not any(task.done() for task in waiting)
    assert repr(listeners) == f"<Listeners {listeners.ports[0]}, {listeners.ports[1]} clients held>"
    listeners.reset_clients()
    listeners.reset_clients()
    assert repr(listeners).endswith("clients reset>")
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, ConnectionResetError)
    with pytest.raises(ConnectionResetError):
        await exchange(listeners.ports[0], b"new")
    listeners.hold_clients()
    listeners.hold_clients()
    held = asyncio.create_task(exchange(listeners.ports[1], b"x"))
    peer, _ = await asyncio.wait_for(loop.sock_accept(listeners.sockets[1]), 20)  # as a worker would
    with peer:
        await loop.sock_sendall(peer, await loop.sock_recv(peer, 10))
        assert await loop.sock_recv(peer, 10) == b""
    assert await held == b"x"
    listeners.reset_clients()
    listeners.close()  # this also ends its watch
    assert all(listener.fileno() == -1 for listener in listeners.sockets)


async def test_resetting_clients_survives_a_lack_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[socket.socket] = []
    reset_waiting_clients = Listeners._reset_waiting_clients

    def count_and_reset(listeners: Listeners, listener: socket.socket) -> None:
        calls.append(listener)
        reset_waiting_clients(listeners, listener)

    monkeypatch.setattr(Listeners, "_reset_waiting_clients", count_and_reset)
    listeners = Listeners(TWO[:1])
    with socket.socket() as client:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", listeners.ports[0]))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as probe:
            highest = probe.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
        try:
            listeners.reset_clients()
            await asyncio.sleep(0.25)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert 1 <= len(calls) <= 4, "each try is followed by a pause"
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(loop.sock_recv(client, 1), 20)
    listeners.close()


async def test_a_failed_bind_leaves_no_descriptor() -> None:
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as probe:
        highest = probe.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            Listeners([Target("127.0.0.1", port) for port in range(1, 20)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await wait_until(lambda: descriptors() == before, "all closed")
