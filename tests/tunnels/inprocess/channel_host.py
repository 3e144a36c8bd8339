"""A paramiko server at the other end of our channels, for tests: it can send any message, right or wrong."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import paramiko
from paramiko.common import (
    OPEN_SUCCEEDED,
)

from gpumesh.topology import Target
from gpumesh.tunnels.forwarder import Forwarder
from gpumesh.tunnels.inprocess.channel_multiplexer import ChannelMultiplexer
from gpumesh.tunnels.inprocess.channel_relay import ChannelRelay
from tests.tunnels.polling import wait_until

P = ParamSpec("P")


T = TypeVar("T")


TARGET = Target("127.0.0.1", 80)


PATIENCE_S = 20.0


def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
    return asyncio.wait_for(asyncio.to_thread(function, *args, **kwargs), PATIENCE_S)


class ServerPolicy(paramiko.ServerInterface):
    """Accepts every login. ``answer`` is the reply to requests for channels."""

    answer = OPEN_SUCCEEDED
    requested_target: tuple[str, int] | None = None

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
        self.requested_target = destination
        return self.answer


@dataclass
class ChannelHost:
    """The host's end. ``accept`` returns the blocking channel of the next connection."""

    server: Any
    client: Any
    port: int
    forwarder: Forwarder
    multiplexer: ChannelMultiplexer
    policy: ServerPolicy
    refused: list[tuple[Target, int]] = field(default_factory=list)

    async def accept(self) -> paramiko.Channel:
        channel = await run_in_thread(self.server.accept, PATIENCE_S)
        assert isinstance(channel, paramiko.Channel)
        channel.settimeout(PATIENCE_S)
        return channel

    async def connect(self) -> tuple[socket.socket, paramiko.Channel]:
        """A client of the local port, and the host's end of it."""
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return sock, await self.accept()

    def send_message(self, channel: paramiko.Channel, kind: bytes, *strings: bytes | int | bool) -> None:
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
    def relays(self) -> list[ChannelRelay]:
        return [relay for relay in self.client._channels.values() if isinstance(relay, ChannelRelay)]

    async def wait_until_removed(self) -> None:
        await wait_until(
            lambda: not self.relays and not self.forwarder.connections and not self.multiplexer._open_deadlines,
            "the removal of every relay",
        )
        assert len(self.client.channels_seen) == 0


class IgnoredEvent:
    """For ``start_server``, which would wait for the handshake without it."""

    def set(self) -> None:
        pass

    def is_set(self) -> bool:
        return True

    def clear(self) -> None:
        pass


async def receive_bytes(sock: socket.socket, count: int) -> bytes:
    received = bytearray()
    async with asyncio.timeout(PATIENCE_S):
        while len(received) < count:
            piece = await asyncio.get_running_loop().sock_recv(sock, count - len(received))
            if not piece:
                break
            received += piece
    return bytes(received)


async def send_bytes(sock: socket.socket, data: bytes) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.get_running_loop().sock_sendall(sock, data)


def read_to_end(channel: paramiko.Channel) -> bytes:
    """To the client's end."""
    received = bytearray()
    while piece := channel.recv(1 << 20):
        received += piece
    return bytes(received)
