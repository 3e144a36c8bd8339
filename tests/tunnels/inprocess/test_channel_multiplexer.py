"""The private parts of paramiko that our channels use."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
from typing import Any

import paramiko
import pytest
from paramiko.common import (
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
)

from gpumesh.tunnels.forwarder import Forwarder
from gpumesh.tunnels.inprocess import channel_multiplexer
from gpumesh.tunnels.inprocess.channel_multiplexer import ChannelMultiplexer
from tests.tunnels.inprocess.channel_host import PATIENCE_S, TARGET, ChannelHost, read_to_end, run_in_thread
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import needs_sshd
from tests.tunnels.traffic import exchange

pytestmark = [pytest.mark.real, needs_sshd]


def test_paramiko_has_the_private_parts_that_channels_need() -> None:
    """Fails loudly when a new paramiko changes what is used of its private parts: then read channels.py against it."""
    here, there = socket.socketpair()
    with here, there:
        transport = paramiko.Transport(here)
        assert channel_multiplexer.find_missing_feature(transport) is None
        table = transport._channel_handler_table  # type: ignore[attr-defined]
        transport._channel_handler_table = {**table, 255: None}  # type: ignore[attr-defined]
        assert "_channel_handler_table" in (channel_multiplexer.find_missing_feature(transport) or "")
    loop = inspect.getsource(paramiko.Transport.run)
    assert "self._channel_handler_table[ptype](chan, m)" in loop
    assert "self._handler_table[ptype](m)" in loop
    assert "chan._unlink()" in loop
    assert "self._parse_debug(m)" in loop
    assert "MSG_CHANNEL_OPEN: self._parse_channel_open" in inspect.getsource(paramiko.Transport.__init__)
    opened = inspect.getsource(paramiko.Transport._parse_channel_open_success)  # type: ignore[attr-defined]
    assert "chan._set_remote_channel(" in opened
    opening = inspect.getsource(paramiko.Transport.open_channel)
    for step in ("self._next_channel()", "self._channels.put(chanid, chan)", "self.channels_seen[chanid] = True"):
        assert step in opening
    major = int(paramiko.__version__.split(".")[0])
    assert 4 <= major < 6, "pyproject.toml pins the range that was tried"


async def test_paramikos_own_channels_work_on_the_same_transport(host: ChannelHost) -> None:
    exchanging = asyncio.create_task(exchange(host.port, b"x"))
    channel = await host.accept()
    session = await run_in_thread(host.client.open_session, timeout=PATIENCE_S)
    there = await host.accept()
    await run_in_thread(session.exec_command, "anything")
    session.sendall(b"in")
    assert await run_in_thread(there.recv, 10) == b"in"
    there.sendall_stderr(b"err")
    there.send_exit_status(3)
    there.close()
    assert await run_in_thread(session.recv_stderr, 10) == b"err"
    assert await run_in_thread(session.recv_exit_status) == 3
    assert await run_in_thread(session.recv, 10) == b""
    await run_in_thread(read_to_end, channel)
    channel.close()
    assert await exchanging == b""


@pytest.mark.parametrize("reason", [OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED, OPEN_FAILED_CONNECT_FAILED])
async def test_a_refused_channel_resets_the_client_and_is_reported(host: ChannelHost, reason: int) -> None:
    host.policy.answer = reason
    with pytest.raises(ConnectionResetError):
        await exchange(host.port, b"x")
    assert host.refused == [(TARGET, reason)]
    await host.wait_until_removed()
    with pytest.raises(paramiko.ChannelException):  # paramiko's own channels are refused as before
        await run_in_thread(host.client.open_channel, "direct-tcpip", ("a", 1), ("b", 2), timeout=PATIENCE_S)


async def test_a_channel_open_without_an_answer_times_out(
    host: ChannelHost, unanswered_opens: list[paramiko.Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_multiplexer, "OPEN_TIMEOUT_S", 0.2)
    exchanging = [asyncio.create_task(exchange(host.port, b"x")) for _ in range(3)]
    for task in exchanging:
        with pytest.raises(ConnectionResetError):
            await task
    assert len(unanswered_opens) == 3
    assert not host.multiplexer._open_deadlines
    # The host answers late: the channel is closed again, and its number is free.
    for message in unanswered_opens:
        host.server._parse_channel_open(message)
        channel = await host.accept()
        assert await run_in_thread(read_to_end, channel) == b""
    await host.wait_until_removed()


async def test_a_client_may_go_before_the_channel_is_open(
    host: ChannelHost, unanswered_opens: list[paramiko.Message]
) -> None:
    gone = asyncio.create_task(exchange(host.port, b"x" * 10))
    await wait_until(lambda: len(unanswered_opens) == 1, "the request for a channel")
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    host.server._parse_channel_open(unanswered_opens[0])
    channel = await host.accept()
    await run_in_thread(read_to_end, channel)
    channel.close()
    await host.wait_until_removed()


async def test_short_connections_leave_nothing_behind(host: ChannelHost) -> None:
    """No timer either: at a thousand requests a second they would add up."""
    for _ in range(100):
        exchanging = asyncio.create_task(exchange(host.port, b"x"))
        channel = await host.accept()
        channel.shutdown_write()
        assert await exchanging == b""
        await run_in_thread(read_to_end, channel)
    await host.wait_until_removed()
    assert len(host.forwarder._timers) <= 1


def test_a_transport_without_its_private_parts_is_not_used() -> None:
    here, there = socket.socketpair()
    forwarder = Forwarder()
    with here, there, contextlib.closing(forwarder):
        transport: Any = paramiko.Transport(here)
        assert channel_multiplexer.find_missing_feature(transport) is None
        for name in ("_next_channel", "_send_user_message", "_parse_channel_open_success", "_channels", "lock"):
            broken: Any = paramiko.Transport(here)
            setattr(broken, name, None) if callable(getattr(broken, name)) else delattr(broken, name)
            assert name in (channel_multiplexer.find_missing_feature(broken) or "")
            with pytest.raises(NotImplementedError, match=name):
                ChannelMultiplexer(broken, forwarder, lambda target, reason: None)
