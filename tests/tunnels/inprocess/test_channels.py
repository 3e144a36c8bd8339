"""Forwarded connections over a paramiko transport, whose host is paramiko's server: so that each of its words, right
or wrong, can be said by the test. Against OpenSSH's sshd they are tested in test_via_sshtunnel.py."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import paramiko
import pytest
from paramiko.common import (
    MSG_CHANNEL_OPEN,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_SUCCEEDED,
    cMSG_CHANNEL_CLOSE,
    cMSG_CHANNEL_EXTENDED_DATA,
    cMSG_CHANNEL_FAILURE,
    cMSG_CHANNEL_SUCCESS,
)

from gpumesh.topology import Target
from gpumesh.tunnels.forwarder import Forwarder
from gpumesh.tunnels.inprocess import channels
from gpumesh.tunnels.inprocess.channels import WINDOW, ChannelMultiplexer, ChannelRelay
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import listener
from tests.tunnels.traffic import exchange

P = ParamSpec("P")
T = TypeVar("T")

TARGET = Target("127.0.0.1", 80)
PATIENCE_S = 20.0


def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
    return asyncio.wait_for(asyncio.to_thread(function, *args, **kwargs), PATIENCE_S)


class Policy(paramiko.ServerInterface):
    """Lets everybody in and, unless told otherwise, everything be reached."""

    answer = OPEN_SUCCEEDED
    asked: tuple[str, int] | None = None

    def check_auth_none(self, username: str) -> int:
        return paramiko.common.AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "none"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        return True

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        self.asked = destination
        return self.answer


@dataclass
class Host:
    """The far end. ``accept`` gives the channel of the next connection, a blocking one."""

    server: Any
    client: Any
    port: int
    forwarder: Forwarder
    carrier: ChannelMultiplexer
    policy: Policy
    refused: list[tuple[Target, int]] = field(default_factory=list)

    async def accept(self) -> paramiko.Channel:
        channel = await in_thread(self.server.accept, PATIENCE_S)
        assert isinstance(channel, paramiko.Channel)
        channel.settimeout(PATIENCE_S)
        return channel

    async def connect(self) -> tuple[socket.socket, paramiko.Channel]:
        """A client of the local port, and the host's end of it."""
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return sock, await self.accept()

    def say(self, channel: paramiko.Channel, kind: bytes, *strings: bytes | int | bool) -> None:
        """Any message for a channel's other end."""
        message = paramiko.Message()
        message.add_byte(kind)
        message.add_int(channel.remote_chanid)
        for part in strings:
            if isinstance(part, bool):
                message.add_boolean(part)
            elif isinstance(part, int):
                message.add_int(part)
            else:
                message.add_string(part)
        self.server._send_user_message(message)

    @property
    def circuits(self) -> list[ChannelRelay]:
        return [one for one in self.client._channels.values() if type(one) is ChannelRelay]

    async def until_forgotten(self) -> None:
        await wait_until(
            lambda: not self.circuits and not self.forwarder.connections and not self.carrier._opening,
            "every circuit forgotten",
        )
        assert len(self.client.channels_seen) == 0


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    here, there = socket.socketpair()
    server, client = paramiko.Transport(there), paramiko.Transport(here)
    server.add_server_key(paramiko.ECDSAKey.generate())
    policy = Policy()
    forwarder = Forwarder()
    refused: list[tuple[Target, int]] = []
    with listener() as local:
        try:
            await in_thread(server.start_server, server=policy, event=_Unheard())  # type: ignore[arg-type]
            await in_thread(client.start_client, timeout=PATIENCE_S)
            await in_thread(client.auth_none, "me")
            carrier = ChannelMultiplexer(client, forwarder, lambda target, reason: refused.append((target, reason)))
            forwarder.listen(local, carrier.make_dialer(TARGET))
            forwarder.start()
            yield Host(server, client, local.getsockname()[1], forwarder, carrier, policy, refused)
        finally:
            assert await asyncio.to_thread(forwarder.close)
            for transport in (client, server):
                transport.close()
                await in_thread(transport.join, PATIENCE_S)


class _Unheard:
    """For ``start_server``, which would wait for the handshake without it."""

    def set(self) -> None:
        pass

    def is_set(self) -> bool:
        return True

    def clear(self) -> None:
        pass


async def receive(sock: socket.socket, count: int) -> bytes:
    received = bytearray()
    async with asyncio.timeout(PATIENCE_S):
        while len(received) < count:
            piece = await asyncio.get_running_loop().sock_recv(sock, count - len(received))
            if not piece:
                break
            received += piece
    return bytes(received)


async def send(sock: socket.socket, data: bytes) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.get_running_loop().sock_sendall(sock, data)


def read_all(channel: paramiko.Channel) -> bytes:
    """To the client's end."""
    received = bytearray()
    while piece := channel.recv(1 << 20):
        received += piece
    return bytes(received)


# -- bytes -----------------------------------------------------------------------------------------------------------


async def test_bytes_go_both_ways(host: Host) -> None:
    asked = asyncio.create_task(exchange(host.port, b"question" * 100_000))
    channel = await host.accept()
    assert host.policy.asked == (TARGET.host, TARGET.port)
    assert await in_thread(read_all, channel) == b"question" * 100_000
    await in_thread(channel.sendall, b"answer" * 200_000)
    channel.shutdown_write()
    assert await asked == b"answer" * 200_000
    await host.until_forgotten()
    assert channel.closed


async def test_the_host_may_end_first(host: Host) -> None:
    sock, channel = await host.connect()
    with sock:
        channel.sendall(b"all I have to say")
        channel.shutdown_write()
        assert await receive(sock, 100) == b"all I have to say"
        await send(sock, b"still here")
        sock.shutdown(socket.SHUT_WR)
        assert await in_thread(read_all, channel) == b"still here"
    await host.until_forgotten()


async def test_channels_of_paramikos_own_work_beside_it(host: Host) -> None:
    asked = asyncio.create_task(exchange(host.port, b"x"))
    channel = await host.accept()
    session = await in_thread(host.client.open_session, timeout=PATIENCE_S)
    there = await host.accept()
    await in_thread(session.exec_command, "anything")
    session.sendall(b"in")
    assert await in_thread(there.recv, 10) == b"in"
    there.sendall_stderr(b"err")
    there.send_exit_status(3)
    there.close()
    assert await in_thread(session.recv_stderr, 10) == b"err"
    assert await in_thread(session.recv_exit_status) == 3
    assert await in_thread(session.recv, 10) == b""
    await in_thread(read_all, channel)
    channel.close()
    assert await asked == b""


async def test_random_traffic_over_many_connections_while_keys_are_changed(host: Host) -> None:
    """A key exchange stops all that is sent, at any moment; nothing may be lost, mixed up or waited for in a ring."""
    rng = random.Random(4253)
    payloads = [rng.randbytes(rng.choice((0, 1, 100, 40_000, 300_000))) for _ in range(40)]
    stop = asyncio.Event()

    async def echo(channel: paramiko.Channel) -> None:
        data = await in_thread(read_all, channel)
        await in_thread(channel.sendall, data)
        channel.shutdown_write()

    async def change_keys() -> None:
        # Begun by us; paramiko's server has faults of its own when it begins. An sshd does in test_via_sshtunnel.py.
        for _ in range(6):
            if not stop.is_set():
                await in_thread(host.client.renegotiate_keys)

    async with asyncio.TaskGroup() as group:
        changing = group.create_task(change_keys())
        asked = [group.create_task(exchange(host.port, payload)) for payload in payloads]
        for _ in payloads:
            group.create_task(echo(await host.accept()))
        answers = await asyncio.gather(*asked)
        stop.set()
        await changing
    assert answers == payloads
    await host.until_forgotten()


# -- back-pressure ---------------------------------------------------------------------------------------------------


def pour(channel: paramiko.Channel, limit: int, still_s: float) -> int:
    """Sends until ``limit``, or until nothing was taken for ``still_s``; how much was."""
    channel.settimeout(still_s)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < limit:
            sent += channel.send(b"x" * min(65536, limit - sent))
    channel.settimeout(PATIENCE_S)
    return sent


async def test_a_client_that_does_not_read_stops_the_host(host: Host) -> None:
    sock, channel = await host.connect()
    with sock:
        total = 256 << 20
        sent = await in_thread(pour, channel, total, 0.5)
        assert WINDOW <= sent < total // 2
        (circuit,) = host.circuits
        held = sum(len(piece) for piece in circuit._pending)
        assert 0 < held <= WINDOW
        # All of it arrives, and then the host may go on.
        assert len(await receive(sock, sent)) == sent
        going_on = asyncio.ensure_future(in_thread(pour, channel, 4 * WINDOW, PATIENCE_S))
        assert len(await receive(sock, 4 * WINDOW)) == 4 * WINDOW
        assert await going_on == 4 * WINDOW
        assert not circuit._pending


async def test_a_full_window_of_the_host_holds_up_only_its_own_connection(host: Host) -> None:
    """The selector's thread may not wait for it: it serves all connections."""
    stuck, channel = await host.connect()
    with stuck:
        data = b"y" * (16 << 20)
        sending = asyncio.create_task(send(stuck, data))
        (circuit,) = host.circuits
        await wait_until(lambda: circuit._out_window == 0, "the host's window full")
        for number in range(20):
            asked = asyncio.create_task(exchange(host.port, b"%d" % number))
            other = await host.accept()
            assert await in_thread(read_all, other) == b"%d" % number
            other.sendall(b"ok")
            other.shutdown_write()
            assert await asked == b"ok"
        assert not sending.done()
        reading = asyncio.ensure_future(in_thread(read_all, channel))
        await sending
        stuck.shutdown(socket.SHUT_WR)
        assert await reading == data


async def test_a_host_that_ignores_our_window_is_cut(host: Host) -> None:
    """It would fill our memory."""
    sock, channel = await host.connect()
    good, other = await host.connect()
    with sock, good:
        channel.out_window_size = 1 << 40
        with contextlib.suppress(OSError):
            await in_thread(pour, channel, 64 << 20, 1.0)
        with pytest.raises(ConnectionResetError):
            await receive(sock, 64 << 20)
        await wait_until(lambda: len(host.circuits) == 1, "the cut circuit forgotten")
        other.sendall(b"others live on")
        assert await receive(good, 14) == b"others live on"


# -- ends ------------------------------------------------------------------------------------------------------------


async def test_a_close_without_an_end_is_a_reset(host: Host) -> None:
    """So an sshd closes that was told to: half an answer must not look whole."""
    sock, channel = await host.connect()
    with sock:
        channel.sendall(b"half")
        assert await receive(sock, 4) == b"half"
        host.say(channel, cMSG_CHANNEL_CLOSE)
        with pytest.raises(ConnectionResetError):
            await receive(sock, 1)
    await host.until_forgotten()


async def test_a_close_after_the_end_is_an_end_with_all_that_came_before(host: Host) -> None:
    sock, channel = await host.connect()
    with sock:
        sent = await in_thread(pour, channel, WINDOW, PATIENCE_S)
        channel.close()  # an end, and a close at once
        assert len(await receive(sock, sent + 1)) == sent
    await host.until_forgotten()


async def test_a_client_that_resets_is_told_to_the_host(host: Host) -> None:
    sock, channel = await host.connect()
    await in_thread(pour, channel, WINDOW // 2, PATIENCE_S)
    sock.close()  # with unread data: a reset
    await wait_until(lambda: channel.closed, "the host's end closed")
    await host.until_forgotten()


@pytest.mark.parametrize("reason", [OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED, OPEN_FAILED_CONNECT_FAILED])
async def test_a_refused_channel_is_a_reset_and_is_told(host: Host, reason: int) -> None:
    host.policy.answer = reason
    with pytest.raises(ConnectionResetError):
        await exchange(host.port, b"x")
    assert host.refused == [(TARGET, reason)]
    await host.until_forgotten()
    with pytest.raises(paramiko.ChannelException):  # paramiko's own are refused as before
        await in_thread(host.client.open_channel, "direct-tcpip", ("a", 1), ("b", 2), timeout=PATIENCE_S)


async def test_the_end_of_the_transport_resets_all(host: Host) -> None:
    ends = [await host.connect() for _ in range(5)]
    waiting = asyncio.create_task(exchange(host.port, b"x"))
    _held = await host.accept()  # dropped, it would be closed in order
    host.server.close()
    for sock, _ in ends:
        with sock, pytest.raises(ConnectionResetError):
            await receive(sock, 1)
    with pytest.raises(ConnectionResetError):
        await waiting
    await host.until_forgotten()
    # Whoever comes now is reset, too; when nobody listens any more is for the supervisor to say.
    with pytest.raises(ConnectionResetError):
        await exchange(host.port, b"x")
    await host.until_forgotten()


# -- a host that does not answer, or too late ------------------------------------------------------------------------


@pytest.fixture
def silent(host: Host) -> list[paramiko.Message]:
    """The host keeps the requests for channels to itself: here they are."""
    kept: list[paramiko.Message] = []
    host.server._handler_table[MSG_CHANNEL_OPEN] = kept.append
    return kept


async def test_an_open_that_is_not_answered_has_an_end(
    host: Host, silent: list[paramiko.Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "OPEN_TIMEOUT_S", 0.2)
    asked = [asyncio.create_task(exchange(host.port, b"x")) for _ in range(3)]
    for one in asked:
        with pytest.raises(ConnectionResetError):
            await one
    assert len(silent) == 3
    assert not host.carrier._opening
    # The host answers after all: the channel is closed again, and its number is free.
    for message in silent:
        host.server._parse_channel_open(message)
        channel = await host.accept()
        assert await in_thread(read_all, channel) == b""
    await host.until_forgotten()


async def test_a_client_may_go_before_the_channel_is_open(host: Host, silent: list[paramiko.Message]) -> None:
    gone = asyncio.create_task(exchange(host.port, b"x" * 10))
    await wait_until(lambda: len(silent) == 1, "the request for a channel")
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    host.server._parse_channel_open(silent[0])
    channel = await host.accept()
    await in_thread(read_all, channel)
    channel.close()
    await host.until_forgotten()


async def test_short_connections_leave_nothing_behind(host: Host) -> None:
    """Not a timer, either: at a thousand requests a second they would add up."""
    for _ in range(100):
        asked = asyncio.create_task(exchange(host.port, b"x"))
        channel = await host.accept()
        channel.shutdown_write()
        assert await asked == b""
        await in_thread(read_all, channel)
    await host.until_forgotten()
    assert len(host.forwarder._timers) <= 1


# -- nonsense --------------------------------------------------------------------------------------------------------


async def test_what_has_no_meaning_on_a_forward_is_passed_over(host: Host) -> None:
    sock, channel = await host.connect()
    with sock:
        host.say(channel, cMSG_CHANNEL_EXTENDED_DATA, 1, b"stderr of what?")
        host.say(channel, cMSG_CHANNEL_SUCCESS)
        host.say(channel, cMSG_CHANNEL_FAILURE)
        channel.send_exit_status(7)
        channel.sendall(b"data")
        assert await receive(sock, 4) == b"data"
        await send(sock, b"back")
        assert await in_thread(channel.recv, 4) == b"back"


def test_a_transport_without_its_private_parts_is_not_used() -> None:
    here, there = socket.socketpair()
    forwarder = Forwarder()
    with here, there, contextlib.closing(forwarder):
        transport: Any = paramiko.Transport(here)
        assert channels.find_missing_feature(transport) is None
        for name in ("_next_channel", "_send_user_message", "_parse_channel_open_success", "_channels", "lock"):
            broken: Any = paramiko.Transport(here)
            setattr(broken, name, None) if callable(getattr(broken, name)) else delattr(broken, name)
            assert name in (channels.find_missing_feature(broken) or "")
            with pytest.raises(NotImplementedError, match=name):
                ChannelMultiplexer(broken, forwarder, lambda target, reason: None)


async def test_the_time_to_serve_does_not_grow_with_those_that_wait(host: Host) -> None:
    """A hundred connections that do nothing cost nothing."""
    idle = [(await host.connect())[0] for _ in range(100)]
    began = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - began < 0.25
    for sock in idle:
        sock.close()
