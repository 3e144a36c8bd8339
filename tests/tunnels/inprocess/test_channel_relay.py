"""Forwarded connections over a paramiko transport to paramiko's own server, so that the test can send any message.
test_connection.py has the tests against OpenSSH's sshd."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import time

import paramiko
import pytest
from paramiko.common import (
    cMSG_CHANNEL_CLOSE,
    cMSG_CHANNEL_EXTENDED_DATA,
    cMSG_CHANNEL_FAILURE,
    cMSG_CHANNEL_SUCCESS,
)

from gpumesh.tunnels.inprocess.channel_relay import WINDOW
from tests.tunnels.inprocess.channel_host import (
    PATIENCE_S,
    TARGET,
    ChannelHost,
    read_to_end,
    receive_bytes,
    run_in_thread,
    send_bytes,
)
from tests.tunnels.polling import wait_until
from tests.tunnels.traffic import exchange

# -- bytes -----------------------------------------------------------------------------------------------------------


async def test_bytes_go_both_ways(host: ChannelHost) -> None:
    exchanging = asyncio.create_task(exchange(host.port, b"question" * 100_000))
    channel = await host.accept()
    assert host.policy.requested_target == (TARGET.host, TARGET.port)
    assert await run_in_thread(read_to_end, channel) == b"question" * 100_000
    await run_in_thread(channel.sendall, b"answer" * 200_000)
    channel.shutdown_write()
    assert await exchanging == b"answer" * 200_000
    await host.wait_until_removed()
    assert channel.closed


async def test_the_host_may_send_eof_first(host: ChannelHost) -> None:
    sock, channel = await host.connect()
    with sock:
        channel.sendall(b"all I have to say")
        channel.shutdown_write()
        assert await receive_bytes(sock, 100) == b"all I have to say"
        await send_bytes(sock, b"still here")
        sock.shutdown(socket.SHUT_WR)
        assert await run_in_thread(read_to_end, channel) == b"still here"
    await host.wait_until_removed()


async def test_random_traffic_over_many_connections_while_keys_are_changed(host: ChannelHost) -> None:
    """A key exchange stops all sending, at any moment. Nothing may be lost, mixed up, or wait for itself."""
    rng = random.Random(4253)
    payloads = [rng.randbytes(rng.choice((0, 1, 100, 40_000, 300_000))) for _ in range(40)]
    stop = asyncio.Event()

    async def echo(channel: paramiko.Channel) -> None:
        data = await run_in_thread(read_to_end, channel)
        await run_in_thread(channel.sendall, data)
        channel.shutdown_write()

    async def change_keys() -> None:
        # We start it: paramiko's server has bugs when it starts one. In test_connection.py an sshd starts it.
        for _ in range(6):
            if not stop.is_set():
                await run_in_thread(host.client.renegotiate_keys)

    async with asyncio.TaskGroup() as group:
        changing = group.create_task(change_keys())
        exchanging = [group.create_task(exchange(host.port, payload)) for payload in payloads]
        for _ in payloads:
            group.create_task(echo(await host.accept()))
        answers = await asyncio.gather(*exchanging)
        stop.set()
        await changing
    assert answers == payloads
    await host.wait_until_removed()


# -- back-pressure ---------------------------------------------------------------------------------------------------


def pour(channel: paramiko.Channel, limit: int, still_s: float) -> int:
    """Sends until ``limit``, or until the other end takes nothing for ``still_s``. The number of bytes sent."""
    channel.settimeout(still_s)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < limit:
            sent += channel.send(b"x" * min(65536, limit - sent))
    channel.settimeout(PATIENCE_S)
    return sent


async def test_a_client_that_does_not_read_stops_the_host(host: ChannelHost) -> None:
    sock, channel = await host.connect()
    with sock:
        total = 256 << 20
        sent = await run_in_thread(pour, channel, total, 0.5)
        assert WINDOW <= sent < total // 2
        (relay,) = host.relays
        assert re.fullmatch(r"<ChannelRelay \d+ to 127\.0\.0\.1:80 OPEN>", repr(relay))
        held = sum(len(piece) for piece in relay._pending)
        assert 0 < held <= WINDOW
        # All of it arrives, and then the host may send more.
        assert len(await receive_bytes(sock, sent)) == sent
        going_on = asyncio.ensure_future(run_in_thread(pour, channel, 4 * WINDOW, PATIENCE_S))
        assert len(await receive_bytes(sock, 4 * WINDOW)) == 4 * WINDOW
        assert await going_on == 4 * WINDOW
        assert not relay._pending


async def test_a_full_window_delays_no_other_connection(host: ChannelHost) -> None:
    """The selector's thread serves all connections, so it must not wait."""
    stuck, channel = await host.connect()
    with stuck:
        data = b"y" * (16 << 20)
        sending = asyncio.create_task(send_bytes(stuck, data))
        (relay,) = host.relays
        await wait_until(lambda: relay._send_window == 0, "the host's window full")
        for number in range(20):
            exchanging = asyncio.create_task(exchange(host.port, b"%d" % number))
            other = await host.accept()
            assert await run_in_thread(read_to_end, other) == b"%d" % number
            other.sendall(b"ok")
            other.shutdown_write()
            assert await exchanging == b"ok"
        assert not sending.done()
        reading = asyncio.ensure_future(run_in_thread(read_to_end, channel))
        await sending
        stuck.shutdown(socket.SHUT_WR)
        assert await reading == data


async def test_a_channel_that_ignores_our_window_is_aborted(host: ChannelHost) -> None:
    """Otherwise it would fill our memory."""
    sock, channel = await host.connect()
    good, other = await host.connect()
    with sock, good:
        channel.out_window_size = 1 << 40
        with contextlib.suppress(OSError):
            await run_in_thread(pour, channel, 64 << 20, 1.0)
        with pytest.raises(ConnectionResetError):
            await receive_bytes(sock, 64 << 20)
        await wait_until(lambda: len(host.relays) == 1, "the removal of the aborted relay")
        other.sendall(b"others live on")
        assert await receive_bytes(good, 14) == b"others live on"


# -- ends ------------------------------------------------------------------------------------------------------------


async def test_a_close_without_eof_resets_the_client(host: ChannelHost) -> None:
    """An sshd that is stopped closes so: half an answer must not look like a whole one."""
    sock, channel = await host.connect()
    with sock:
        channel.sendall(b"half")
        assert await receive_bytes(sock, 4) == b"half"
        host.send_message(channel, cMSG_CHANNEL_CLOSE)
        with pytest.raises(ConnectionResetError):
            await receive_bytes(sock, 1)
    await host.wait_until_removed()


async def test_a_close_after_eof_delivers_all_data_and_ends_in_order(host: ChannelHost) -> None:
    sock, channel = await host.connect()
    with sock:
        sent = await run_in_thread(pour, channel, WINDOW, PATIENCE_S)
        channel.close()  # EOF and CLOSE at once
        assert len(await receive_bytes(sock, sent + 1)) == sent
    await host.wait_until_removed()


async def test_a_reset_by_the_client_closes_the_channel_on_the_host(host: ChannelHost) -> None:
    sock, channel = await host.connect()
    await run_in_thread(pour, channel, WINDOW // 2, PATIENCE_S)
    sock.close()  # with unread data: a reset
    await wait_until(lambda: channel.closed, "the host's end closed")
    await host.wait_until_removed()


async def test_the_end_of_the_transport_resets_all(host: ChannelHost) -> None:
    ends = [await host.connect() for _ in range(5)]
    waiting = asyncio.create_task(exchange(host.port, b"x"))
    _held = await host.accept()  # kept: paramiko closes a channel that is dropped
    host.server.close()
    for sock, _ in ends:
        with sock, pytest.raises(ConnectionResetError):
            await receive_bytes(sock, 1)
    with pytest.raises(ConnectionResetError):
        await waiting
    await host.wait_until_removed()
    # A later client is reset, too. It is for the supervisor to stop listening.
    with pytest.raises(ConnectionResetError):
        await exchange(host.port, b"x")
    await host.wait_until_removed()


# -- nonsense --------------------------------------------------------------------------------------------------------


async def test_messages_without_meaning_for_a_forward_are_ignored(host: ChannelHost) -> None:
    sock, channel = await host.connect()
    with sock:
        host.send_message(channel, cMSG_CHANNEL_EXTENDED_DATA, 1, b"stderr of what?")
        host.send_message(channel, cMSG_CHANNEL_SUCCESS)
        host.send_message(channel, cMSG_CHANNEL_FAILURE)
        channel.send_exit_status(7)
        channel.sendall(b"data")
        assert await receive_bytes(sock, 4) == b"data"
        await send_bytes(sock, b"back")
        assert await run_in_thread(channel.recv, 4) == b"back"


async def test_idle_connections_cost_no_cpu_time(host: ChannelHost) -> None:
    """A hundred connections that do nothing cost nothing."""
    idle = [(await host.connect())[0] for _ in range(100)]
    began = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - began < 0.25
    for sock in idle:
        sock.close()
