"""Routes the packets of our own channels (channel_relay.py) on a paramiko transport, and makes such channels.

This uses private parts of paramiko: the table of packet handlers, the map of channels, and the way a channel is made.
``find_missing_feature`` reports when a paramiko lacks one of them; then sshtunnel's own, slower forwarding is used
(sshtunnel_connector.py).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import paramiko
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_SUCCESS,
    MSG_CHANNEL_WINDOW_ADJUST,
)

from gpumesh.topology import Target
from gpumesh.tunnels.forwarder import Dialer, Forwarder
from gpumesh.tunnels.inprocess.channel_relay import ChannelRelay

OPEN_TIMEOUT_S = 30.0  # the time for the host to reach its target; the kernel there may try for two minutes

ADMINISTRATIVELY_PROHIBITED = 1  # RFC 4254, section 5.1

OnChannelRefused = Callable[[Target, int], None]
"""Called with the target of a channel that the host did not open, and the reason code of RFC 4254 section 5.1."""

ChannelHandler = Callable[[Any, Any], None]
"""Called with a channel and a message, in the transport's thread."""

_CHANNEL_MESSAGES = (
    MSG_CHANNEL_SUCCESS,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_WINDOW_ADJUST,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_CLOSE,
)


def find_missing_feature(transport: Any) -> str | None:
    """Describes a private part of paramiko that this version lacks; ``None``: this version has all that we use."""
    table = getattr(transport, "_channel_handler_table", None)
    if not isinstance(table, dict) or set(table) != set(_CHANNEL_MESSAGES):
        return "Transport._channel_handler_table is not the table it was"
    if MSG_CHANNEL_OPEN_FAILURE not in getattr(transport, "_handler_table", {}):
        return "Transport._handler_table has no handler for a refused channel"
    for name in ("_next_channel", "_send_user_message", "_parse_channel_open_success"):
        if not callable(getattr(transport, name, None)):
            return f"Transport.{name} is gone"
    for name in ("lock", "channels_seen", "_channels"):
        if not hasattr(transport, name):
            return f"Transport.{name} is gone"
    if not all(callable(getattr(transport._channels, name, None)) for name in ("put", "get", "delete")):
        return "Transport._channels has no put, get, delete"
    return None


class ChannelMultiplexer:
    """The channels of one transport: makes dialers for them, and passes the transport's packets on to them.

    A multiplexer must be made before the transport carries any channel.
    """

    def __init__(self, transport: paramiko.Transport, forwarder: Forwarder, on_refused: OnChannelRefused) -> None:
        """``on_refused`` is called in the transport's thread. Raises NotImplementedError when paramiko lacks a part."""
        missing = find_missing_feature(transport)
        if missing is not None:
            raise NotImplementedError(missing)
        self.transport: Any = transport
        self.forwarder = forwarder
        self._on_refused = on_refused
        # Monotonic seconds. All relays have the same time-out, so the soonest deadline comes first.
        self._open_deadlines: dict[ChannelRelay, float] = {}
        self._timer_is_running = False  # for the first of the ``_open_deadlines``
        self._replace_channel_handlers()
        self._replace_open_failure_handler()

    def __repr__(self) -> str:
        return f"<ChannelMultiplexer {len(self._open_deadlines)} channels opening>"

    def make_dialer(self, target: Target) -> Dialer:
        """Makes a dialer for ``Forwarder.listen`` that forwards connections to ``target``, as the host sees it."""

        def dial(forwarder: Forwarder, local: socket.socket) -> None:  # noqa: ARG001 - the same as self.forwarder
            ChannelRelay(self, local, target).open()

        return dial

    def report_refused(self, target: Target, reason: int) -> None:
        self._on_refused(target, reason)

    # -- in the selector's thread ------------------------------------------------------------------------------------

    def send(self, message: paramiko.Message) -> None:
        """Sends a packet to the host. Blocks during a key exchange, and while the SSH socket is full.

        Raises nothing. If the packet cannot be sent, the transport is closed, and then notifies each channel itself.
        """
        try:
            self.transport._send_user_message(message)
        except (OSError, EOFError, paramiko.SSHException):
            self.transport.close()

    def start_open_timeout(self, relay: ChannelRelay) -> None:
        """Aborts the relay if the host does not answer within ``OPEN_TIMEOUT_S``.

        All relays share one timer: a timer per relay would keep each relay in memory for that time, however short its
        life was.
        """
        self._open_deadlines[relay] = time.monotonic() + OPEN_TIMEOUT_S
        self._start_timer()

    def cancel_open_timeout(self, relay: ChannelRelay) -> None:
        self._open_deadlines.pop(relay, None)

    def _start_timer(self) -> None:
        """Starts the timer for the soonest deadline, if there is a deadline and no timer runs."""
        if self._open_deadlines and not self._timer_is_running:
            self._timer_is_running = True
            soonest_deadline = next(iter(self._open_deadlines.values()))
            self.forwarder.call_later(soonest_deadline - time.monotonic(), self._abort_overdue)

    def _abort_overdue(self) -> None:
        """Aborts the relays whose deadline has passed. Called by the timer."""
        self._timer_is_running = False
        now = time.monotonic()
        overdue_relays = [relay for relay, deadline in self._open_deadlines.items() if deadline <= now]
        for relay in overdue_relays:
            self.cancel_open_timeout(relay)
            relay.abort()
        self._start_timer()

    def _close_paramiko_channel(self, original: ChannelHandler, channel: Any, message: paramiko.Message) -> None:
        """Calls ``original``, paramiko's handler of a close, which sends an answer to the host.

        When the transport has ended, ``original`` raises an error. The error must not end the selector's thread, which
        serves all other channels.
        """
        try:
            original(channel, message)
        except (OSError, EOFError, paramiko.SSHException):
            self.transport.close()

    # -- paramiko's handlers, called in the transport's thread -------------------------------------------------------

    def _replace_channel_handlers(self) -> None:
        """Makes paramiko give messages for our channels to our methods, and all other messages to its own handlers."""
        originals: dict[int, ChannelHandler] = dict(self.transport._channel_handler_table)

        def handle_close(channel: Any, message: paramiko.Message) -> None:
            if isinstance(channel, ChannelRelay):
                channel.on_close(message)
            else:
                # Not in this thread: paramiko's answer waits for the end of a key exchange, which only this thread can
                # finish. The two would wait for each other for 30 s.
                original = originals[MSG_CHANNEL_CLOSE]
                self.forwarder.post(partial(self._close_paramiko_channel, original, channel, message))

        relay_methods = {
            MSG_CHANNEL_DATA: ChannelRelay.on_data,
            MSG_CHANNEL_EXTENDED_DATA: _ignore_message,  # a command's stderr; a forwarded connection has none
            MSG_CHANNEL_WINDOW_ADJUST: ChannelRelay.on_window_adjust,
            MSG_CHANNEL_EOF: ChannelRelay.on_eof,
            MSG_CHANNEL_REQUEST: _ignore_message,
            MSG_CHANNEL_SUCCESS: _ignore_message,
            MSG_CHANNEL_FAILURE: _ignore_message,
        }
        self.transport._channel_handler_table = {
            **originals,
            **{kind: _route_handler(method, originals[kind]) for kind, method in relay_methods.items()},
            MSG_CHANNEL_CLOSE: handle_close,
        }

    def _replace_open_failure_handler(self) -> None:
        """Makes paramiko report a channel of ours that the host did not open to its relay."""
        original = self.transport._handler_table[MSG_CHANNEL_OPEN_FAILURE]

        def handle_open_failure(message: paramiko.Message) -> None:
            channel_number = message.get_int()
            channel = self.transport._channels.get(channel_number)
            if isinstance(channel, ChannelRelay):  # ours; paramiko itself opens the channels of sessions
                reason = message.get_int()
                channel.on_refused(reason)
            else:
                message.rewind()  # paramiko reads the message from its beginning
                original(message)

        self.transport._handler_table[MSG_CHANNEL_OPEN_FAILURE] = handle_open_failure


def _ignore_message(relay: ChannelRelay, message: paramiko.Message) -> None:
    """Does nothing: handles the messages that have no meaning on a forwarded connection."""


def _route_handler(
    method: Callable[[ChannelRelay, paramiko.Message], None], original: ChannelHandler
) -> ChannelHandler:
    """Returns a handler that calls ``method`` for our own channels, and ``original`` for paramiko's channels."""

    def handle(channel: Any, message: paramiko.Message) -> None:
        if isinstance(channel, ChannelRelay):
            method(channel, message)
        else:
            original(channel, message)

    return handle
