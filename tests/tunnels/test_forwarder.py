"""The selector thread: accepting, callbacks, its end, many connections, a lack of descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from pathlib import Path

import pytest

from gpumesh.tunnels.forwarder import Forwarder
from gpumesh.tunnels.openssh.unix_relay import relay_to_unix
from tests.tunnels.forwarding import connect, descriptor_limit, forwarded_to, port_of, running_forwarder
from tests.tunnels.polling import wait_until
from tests.tunnels.traffic import echo, exchange


async def test_closing_resets_clients_and_leaves_the_listener(local: socket.socket, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with forwarded_to(echo, local, tmp_path) as forwarder:
        with await connect(local) as sock:
            await loop.sock_sendall(sock, b"half")
            assert await loop.sock_recv(sock, 4) == b"half"
            assert await asyncio.to_thread(forwarder.close)
            assert await asyncio.to_thread(forwarder.close)  # again
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(sock, 1)
        waiting = asyncio.create_task(exchange(port_of(local), b"for the next one"))
        async with running_forwarder(local, tmp_path / "s"):
            assert await waiting == b"for the next one"


async def test_close_before_run(local: socket.socket) -> None:
    ended: list[str] = []
    forwarder = Forwarder(lambda: ended.append("end"))
    forwarder.listen(local, relay_to_unix("/nonexistent"))
    assert repr(forwarder) == "<Forwarder NEW 1 listeners 0 connections>"
    assert forwarder.close()
    assert repr(forwarder) == "<Forwarder ENDED 1 listeners 0 connections>"
    forwarder.run()  # like a thread that starts late: it returns
    forwarder.post(lambda: ended.append("posted"))  # dropped
    assert ended == ["end"]


async def test_an_error_in_a_handler_ends_the_loop_and_calls_on_end(local: socket.socket) -> None:
    """The owner of the connection has to know that nothing is forwarded any more."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def dial(forwarder: Forwarder, local: socket.socket) -> None:
        local.close()
        raise ZeroDivisionError

    def on_end() -> None:
        loop.call_soon_threadsafe(ended.set)

    forwarder = Forwarder(on_end)
    forwarder.listen(local, dial)
    running = asyncio.create_task(asyncio.to_thread(forwarder.run))
    with await connect(local), pytest.raises(ZeroDivisionError):
        await running
    await asyncio.wait_for(ended.wait(), 10)


# -- scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_thousand_connections_at_once(local: socket.socket, tmp_path: Path) -> None:
    count = 1000
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 5 * count:
        pytest.skip(f"at most {hard} descriptors a process here")
    with descriptor_limit(5 * count):
        all_there = asyncio.Event()
        there = 0

        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal there
            data = await reader.readexactly(4)
            there += 1
            if there == count:
                all_there.set()
            await all_there.wait()
            writer.write(data)
            writer.close()

        async with forwarded_to(hold, local, tmp_path) as forwarder:
            asked = [asyncio.create_task(exchange(port_of(local), b"%04d" % number)) for number in range(count)]
            async with asyncio.timeout(30):
                await all_there.wait()
            assert forwarder.connections == count
            assert await asyncio.gather(*asked) == [b"%04d" % number for number in range(count)]
            await wait_until(lambda: forwarder.connections == 0, "no connection left")


@pytest.mark.parametrize("left", [0, 1])
async def test_out_of_descriptors(local: socket.socket, tmp_path: Path, left: int) -> None:
    """A connection takes two descriptors. With none left clients wait, with one left they are reset. Neither ends other
    connections."""
    async with forwarded_to(echo, local, tmp_path) as forwarder:
        clients = [socket.socket() for _ in range(6)]
        with contextlib.ExitStack() as stack:
            for client in clients:
                stack.enter_context(client)
                client.settimeout(20)
            probe = socket.socket()
            highest = probe.fileno()
            probe.close()
            with descriptor_limit(highest + left):
                for client in clients:
                    with contextlib.suppress(ConnectionError):  # a client may be reset as soon as this
                        client.connect(("127.0.0.1", port_of(local)))  # the kernel's queue takes them
                await asyncio.sleep(0.3)
            served = 0
            for client in clients:
                with contextlib.suppress(ConnectionError):
                    client.sendall(b"x")
                    served += await asyncio.to_thread(client.recv, 1) == b"x"
            if left == 0:
                assert served == len(clients)
        assert await exchange(port_of(local), b"alive") == b"alive"
        await wait_until(lambda: forwarder.connections == 0, "no connection left")


# -- the loop itself -------------------------------------------------------------------------------------------------


async def test_posted_and_timed_callbacks_run_in_order(local: socket.socket) -> None:
    ran: list[str] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    forwarder = Forwarder()
    forwarder.start()

    def end() -> None:
        loop.call_soon_threadsafe(done.set)

    def begin() -> None:
        forwarder.call_later(0.02, lambda: ran.append("later"))
        forwarder.call_later(0.01, lambda: ran.append("sooner"))
        forwarder.call_later(0.01, lambda: ran.append("sooner, in order"))
        forwarder.call_later(0.03, end)
        ran.append("now")

    forwarder.post(begin)
    await asyncio.wait_for(done.wait(), 10)
    assert ran == ["now", "sooner", "sooner, in order", "later"]
    assert await asyncio.to_thread(forwarder.close)
