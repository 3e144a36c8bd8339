"""Reverse forwards over a paramiko transport: the host opens a channel for each connection to a port of its loopback.

As in channel_relay.py, two threads work here. The transport's thread reads the host's request for a channel. The
selector's thread connects to the local port, and answers the host.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import paramiko
from paramiko.common import (
    MSG_CHANNEL_OPEN,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_FAILED_RESOURCE_SHORTAGE,
    cMSG_CHANNEL_OPEN_FAILURE,
    cMSG_CHANNEL_OPEN_SUCCESS,
)

from gpumesh.errors import TransportUnsupported
from gpumesh.topology import Target
from gpumesh.tunnels.inprocess.channel_multiplexer import ChannelMultiplexer
from gpumesh.tunnels.inprocess.channel_relay import MAX_PACKET, ChannelRelay, register_channel
from gpumesh.tunnels.inprocess.heartbeat import Heartbeat
from gpumesh.tunnels.local_connect import LocalConnect
from gpumesh.tunnels.reverse_forwards import BIND_ADDRESS, ensure_bound, make_refused_error
from gpumesh.tunnels.transport import ReverseForward

REVERSE_WINDOW = 2 << 20  # bytes, as OpenSSH has it: the weights of a model may come this way
MAX_CONNECTIONS = 64  # at once, for all reverse forwards of a host, so that a host cannot fill our memory

_FORWARDED = "forwarded-tcpip"  # RFC 4254, section 7.2


@dataclass(frozen=True, slots=True)
class OpenedByHost:
    """A channel that the host wants to open. ``number`` is the host's number of it; ``port`` the port at which the host
    has accepted the connection; ``window`` and ``max_packet`` say how many bytes we may send."""

    number: int
    window: int
    max_packet: int
    port: int


class ReverseRelay(ChannelRelay):
    """A connection that came from the host."""

    def accept(self, channel: OpenedByHost) -> None:
        """Accepts the channel, and begins to forward. Aborts if the transport has ended."""
        transport = self._multiplexer.transport
        self._forwarder.add_relay(self)
        self._receive_window = REVERSE_WINDOW
        self._send_window = channel.window
        self._send_packet_limit = min(channel.max_packet, MAX_PACKET)
        self._remote_number = channel.number
        self._number = register_channel(transport, self)
        if not transport.active:  # checked after the registration, as in ``open``
            self.abort()
            return
        message = _make_answer(cMSG_CHANNEL_OPEN_SUCCESS, channel.number)
        message.add_int(self._number)
        message.add_int(REVERSE_WINDOW)
        message.add_int(MAX_PACKET)
        self._multiplexer.send(message)
        self._update()

    @property
    def has_ended(self) -> bool:
        return self._local_closed and self._host_closed


class ReverseChannels:
    """The reverse forwards of one transport. From its making on, it answers the host's requests for their channels."""

    def __init__(self, multiplexer: ChannelMultiplexer, forwards: Sequence[ReverseForward]) -> None:
        """Raises TransportUnsupported when this paramiko lacks a part that is needed."""
        self._multiplexer = multiplexer
        self._forwards = forwards
        self._connecting = 0
        self._relays: set[ReverseRelay] = set()  # also some that have ended
        handlers = multiplexer.transport._handler_table
        original = handlers.get(MSG_CHANNEL_OPEN)
        if original is None:
            raise TransportUnsupported(
                "this version of paramiko cannot forward connections of a host to here", hint="use transport: openssh"
            )

        def handle_open(message: paramiko.Message) -> None:  # in the transport's thread
            """Takes a channel that the host opens for a connection to a forwarded port; any other goes to paramiko."""
            if message.get_text() != _FORWARDED:
                message.rewind()  # paramiko reads the message from its beginning, and refuses the channel
                original(message)
                return
            number, window, max_packet = message.get_int(), message.get_int(), message.get_int()
            message.get_string()  # the address at which the host has accepted the connection
            channel = OpenedByHost(number, window, max_packet, message.get_int())
            multiplexer.forwarder.post(partial(self._handle_open, channel))

        handlers[MSG_CHANNEL_OPEN] = handle_open

    def __repr__(self) -> str:
        open_relays = [relay for relay in self._relays if not relay.has_ended]
        return f"<ReverseChannels {len(self._forwards)} forwards {len(open_relays)} connections>"

    def request(self, heartbeat: Heartbeat, address: str) -> None:
        """Asks the host to listen at the ports. Blocks. ``address`` is the host's, for messages.

        Raises ReverseForwardRefused. If the transport ends meanwhile, returns: others report that.
        """
        transport = self._multiplexer.transport
        for forward in self._forwards:
            transport.debug_lines.clear()
            is_granted = heartbeat.request("tcpip-forward", BIND_ADDRESS, forward.remote_port)
            if not transport.active:
                return
            lines = list(transport.debug_lines)  # they come before the answer
            if not is_granted:
                raise make_refused_error(address, forward.remote_port, lines)
            ensure_bound(address, forward.remote_port, lines)

    # -- in the selector's thread ------------------------------------------------------------------------------------

    def _handle_open(self, channel: OpenedByHost) -> None:
        """Connects to the local port of the channel's forward, or refuses the channel."""
        self._relays = {relay for relay in self._relays if not relay.has_ended}
        local_port = next((forward.local_port for forward in self._forwards if forward.remote_port == channel.port), 0)
        if not local_port:
            self._refuse(channel, OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED)
        elif self._connecting + len(self._relays) >= MAX_CONNECTIONS:
            self._refuse(channel, OPEN_FAILED_RESOURCE_SHORTAGE)
        else:
            self._connecting += 1
            try:
                LocalConnect(
                    self._multiplexer.forwarder,
                    local_port,
                    lambda local: self._on_connected(channel, local_port, local),
                )
            except OSError:  # no descriptor is left
                self._on_connected(channel, local_port, None)

    def _on_connected(self, channel: OpenedByHost, local_port: int, local: socket.socket | None) -> None:
        """Relays the channel to the local connection; ``None``: nothing listens there, so the channel is refused."""
        self._connecting -= 1
        if local is None:
            self._refuse(channel, OPEN_FAILED_CONNECT_FAILED)
            return
        relay = ReverseRelay(self._multiplexer, local, Target("127.0.0.1", local_port))
        self._relays.add(relay)
        relay.accept(channel)

    def _refuse(self, channel: OpenedByHost, reason: int) -> None:
        """``reason``: a code of RFC 4254, section 5.1."""
        message = _make_answer(cMSG_CHANNEL_OPEN_FAILURE, channel.number)
        message.add_int(reason)
        message.add_string("")  # a description, and its language
        message.add_string("en")
        self._multiplexer.send(message)


def _make_answer(message_type: bytes, number: int) -> paramiko.Message:
    """An answer to the host's request for the channel ``number``. The caller adds the rest."""
    message: Any = paramiko.Message()
    message.add_byte(message_type)
    message.add_int(number)
    return message  # type: ignore[no-any-return]
