"""Channels that the host opens; the host is paramiko's server, which can send any message."""

from __future__ import annotations

import asyncio

import paramiko
import pytest
from paramiko.common import (
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_FAILED_RESOURCE_SHORTAGE,
)

from gpumesh.tunnels.inprocess import reverse_channels
from gpumesh.tunnels.inprocess.reverse_channels import REVERSE_WINDOW, ReverseChannels
from gpumesh.tunnels.transport import ReverseForward
from tests.tunnels.forwarding import wait_until_still
from tests.tunnels.inprocess.channel_host import PATIENCE_S, ChannelHost, read_to_end, run_in_thread
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import serving
from tests.tunnels.traffic import echo

REMOTE_PORT = 7000


async def open_channel(host: ChannelHost, port: int = REMOTE_PORT) -> paramiko.Channel:
    channel = await run_in_thread(host.server.open_forwarded_tcpip_channel, ("127.0.0.1", 1), ("127.0.0.1", port))
    assert isinstance(channel, paramiko.Channel)
    channel.settimeout(PATIENCE_S)
    return channel


async def ensure_refused(host: ChannelHost, port: int, reason: int) -> None:
    with pytest.raises(paramiko.ChannelException) as caught:
        await open_channel(host, port)
    assert caught.value.code == reason


async def test_only_the_ports_that_were_asked_for_are_served(host: ChannelHost) -> None:
    async with serving(echo) as local:
        channels = ReverseChannels(host.multiplexer, [ReverseForward(REMOTE_PORT, local), ReverseForward(7001, 1)])
        channel = await open_channel(host)
        await run_in_thread(channel.sendall, b"from the host")
        channel.shutdown_write()
        assert await run_in_thread(read_to_end, channel) == b"from the host"
        await ensure_refused(host, 7001, OPEN_FAILED_CONNECT_FAILED)
        for port in (local, 0, 7002):
            await ensure_refused(host, port, OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED)
        with pytest.raises(paramiko.ChannelException):  # paramiko itself refuses all other kinds
            await run_in_thread(host.server.open_x11_channel, ("127.0.0.1", 1))
        await host.wait_until_removed()
        assert repr(channels) == "<ReverseChannels 2 forwards 0 connections>"


async def test_a_host_cannot_open_channels_without_end(host: ChannelHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reverse_channels, "MAX_CONNECTIONS", 3)
    async with serving(echo) as local:
        ReverseChannels(host.multiplexer, [ReverseForward(REMOTE_PORT, local)])
        opened = [await open_channel(host) for _ in range(3)]
        await ensure_refused(host, REMOTE_PORT, OPEN_FAILED_RESOURCE_SHORTAGE)
        opened[0].close()
        await wait_until(lambda: len(host.relays) == 2, "the end of a channel")
        await open_channel(host)


async def test_a_program_that_does_not_read_stops_the_host(host: ChannelHost) -> None:
    accepted: asyncio.Queue[asyncio.StreamReader] = asyncio.Queue()

    async def stay_silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        accepted.put_nowait(reader)
        await asyncio.Event().wait()

    async with serving(stay_silent) as local, serving(echo) as echo_port:
        ReverseChannels(host.multiplexer, [ReverseForward(REMOTE_PORT, local), ReverseForward(7001, echo_port)])
        channel = await open_channel(host)
        sent = 0

        def flood() -> None:
            nonlocal sent
            try:
                while sent < 64 << 20:
                    sent += channel.send(bytes(1 << 15))
            except OSError:
                pass  # the channel was closed

        flooding = asyncio.create_task(asyncio.to_thread(flood))
        reader = await accepted.get()
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await wait_until_still(lambda: sent)
        (relay,) = host.relays
        assert sum(map(len, relay._pending)) <= REVERSE_WINDOW
        assert sent < 32 << 20
        other = await open_channel(host, 7001)  # nobody else waits
        await run_in_thread(other.sendall, b"other")
        assert await run_in_thread(other.recv, 5) == b"other"
        channel.close()
        await flooding


async def test_the_end_of_the_transport_resets_the_connection(host: ChannelHost) -> None:
    ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    async def hold(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        except ConnectionError as error:
            ended.set_result(error)
        else:
            ended.set_result(None)

    async with serving(hold) as local:
        ReverseChannels(host.multiplexer, [ReverseForward(REMOTE_PORT, local)])
        channel = await open_channel(host)
        await run_in_thread(host.server.close)
        assert isinstance(await asyncio.wait_for(ended, PATIENCE_S), ConnectionResetError)
        await host.wait_until_removed()
        channel.close()
