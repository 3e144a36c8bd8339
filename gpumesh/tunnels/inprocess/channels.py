"""Forwarded connections as channels of a paramiko transport, without a thread for each (facts: tunnel-latency.md).

Two threads work here. The *transport's* thread (paramiko's own, one for each SSH connection) reads packets: what
arrives for a channel it writes to the local socket at once, without blocking. The *selector's* thread (forwarder.py)
does the rest: it reads local sockets, writes what a slow client had no room for, and sends every packet that has to be
sent. The transport's thread never sends, so that it can never wait: neither for a full SSH socket (both sides of a
connection would then wait for each other) nor for a key exchange (which only it can finish).

Back-pressure: window credit is given back only for bytes that the local socket has taken, so a client that reads
slowly stops the host, and at most ``WINDOW`` bytes a channel are held here. In the other direction a local socket is
read only as far as the host's window allows.

This uses parts of paramiko that are private: the per-packet handler table, the map of channels, and the way a channel
is made. ``find_missing_feature`` tells when a paramiko has them no more; then sshtunnel's own forwarding is used
(slower).
"""

from __future__ import annotations

import socket
import time
from collections import deque
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
    cMSG_CHANNEL_CLOSE,
    cMSG_CHANNEL_DATA,
    cMSG_CHANNEL_EOF,
    cMSG_CHANNEL_OPEN,
    cMSG_CHANNEL_WINDOW_ADJUST,
)

from gpumesh.topology import Target
from gpumesh.tunnels.blocking import ThreadLock
from gpumesh.tunnels.forwarder import READ, WRITE, Dialer, Forwarder, close_with_reset

WINDOW = 1 << 20  # bytes that the host may send before we have passed them on: 10 MB/s at 100 ms
MAX_PACKET = 1 << 15
CREDIT_AT = WINDOW // 8  # passed on, before the host is told
OPEN_TIMEOUT_S = 30.0  # for the host to reach its target; the kernel there may try for two minutes

ADMINISTRATIVELY_PROHIBITED = 1  # RFC 4254, 5.1

OnChannelRefused = Callable[[Target, int], None]
"""The host did not open a channel: the target, and the reason of RFC 4254 section 5.1."""

_TABLE = (
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
    """What this paramiko lacks of what is used here; ``None``: nothing."""
    table = getattr(transport, "_channel_handler_table", None)
    if not isinstance(table, dict) or set(table) != set(_TABLE):
        return "Transport._channel_handler_table is not the table it was"
    if MSG_CHANNEL_OPEN_FAILURE not in getattr(transport, "_handler_table", {}):
        return "Transport._handler_table has no handler for a refused channel"
    for name in ("_next_channel", "_send_user_message", "_parse_channel_open_success"):
        if not callable(getattr(transport, name, None)):
            return f"Transport.{name} is gone"
    for name in ("lock", "channels_seen", "_channels"):
        if not hasattr(transport, name):
            return f"Transport.{name} is gone"
    if any(not callable(getattr(transport._channels, name, None)) for name in ("put", "get", "delete")):
        return "Transport._channels has no put, get, delete"
    return None


class ChannelMultiplexer:
    """Puts channels of ours on a transport. Make one before traffic begins, and only one, for a transport."""

    def __init__(self, transport: paramiko.Transport, forwarder: Forwarder, on_refused: OnChannelRefused) -> None:
        missing = find_missing_feature(transport)
        if missing is not None:
            raise NotImplementedError(missing)
        self.transport: Any = transport
        self.forwarder = forwarder
        self.on_refused = on_refused
        self._opening: dict[ChannelRelay, float] = {}  # with the time when each is overdue, which is their order, too
        self._looking = False
        self._take_over()

    def make_dialer(self, target: Target) -> Dialer:
        """A way to ``target``, as seen from the host, for ``Forwarder.listen``."""

        def dial(forwarder: Forwarder, local: socket.socket) -> None:  # noqa: ARG001 - it is ours
            ChannelRelay(self, local, target).open()

        return dial

    def start_open_timeout(self, circuit: ChannelRelay) -> None:
        """In the selector's thread: that the host answers for it in time. Not a timer for each: it would keep the
        circuit for that long, however short its life was."""
        self._opening[circuit] = time.monotonic() + OPEN_TIMEOUT_S
        self._look_again()

    def cancel_open_timeout(self, circuit: ChannelRelay) -> None:
        self._opening.pop(circuit, None)

    def _look_again(self) -> None:
        if self._opening and not self._looking:
            self._looking = True
            self.forwarder.call_later(next(iter(self._opening.values())) - time.monotonic(), self._look)

    def _look(self) -> None:
        self._looking = False
        now = time.monotonic()
        for circuit in [one for one, overdue in self._opening.items() if overdue <= now]:
            self.cancel_open_timeout(circuit)
            circuit.abort()
        self._look_again()

    def send(self, message: paramiko.Message) -> None:
        """In the selector's thread. Waits while keys are exchanged or the SSH socket is full; raises nothing: when the
        transport is gone, each channel is told so by the transport itself."""
        try:
            self.transport._send_user_message(message)
        except (OSError, EOFError, paramiko.SSHException):
            self.transport.close()

    def _answer_close(self, original: Callable[[Any, Any], None], channel: Any, message: paramiko.Message) -> None:
        """paramiko's own way to close a channel. It sends the answer: with the transport gone there is nobody to send
        it to, and this thread serves all other channels."""
        try:
            original(channel, message)
        except (OSError, EOFError, paramiko.SSHException):
            self.transport.close()

    def _take_over(self) -> None:
        originals = dict(self.transport._channel_handler_table)

        def ours(method: Callable[[ChannelRelay, paramiko.Message], None], kind: int) -> Callable[[Any, Any], None]:
            original = originals[kind]

            def handle(channel: Any, message: paramiko.Message) -> None:
                if type(channel) is ChannelRelay:
                    method(channel, message)
                else:
                    original(channel, message)

            return handle

        def close(channel: Any, message: paramiko.Message) -> None:
            if type(channel) is ChannelRelay:
                channel.on_close(message)
            else:
                # paramiko answers in this thread, which waits for itself (30 s) if keys are being exchanged.
                self.forwarder.post(partial(self._answer_close, originals[MSG_CHANNEL_CLOSE], channel, message))

        self.transport._channel_handler_table = {
            **originals,
            MSG_CHANNEL_DATA: ours(ChannelRelay.on_data, MSG_CHANNEL_DATA),
            MSG_CHANNEL_EXTENDED_DATA: ours(ChannelRelay.ignore_message, MSG_CHANNEL_EXTENDED_DATA),
            MSG_CHANNEL_WINDOW_ADJUST: ours(ChannelRelay.on_window_adjust, MSG_CHANNEL_WINDOW_ADJUST),
            MSG_CHANNEL_EOF: ours(ChannelRelay.on_eof, MSG_CHANNEL_EOF),
            MSG_CHANNEL_CLOSE: close,
            MSG_CHANNEL_REQUEST: ours(ChannelRelay.ignore_message, MSG_CHANNEL_REQUEST),
            MSG_CHANNEL_SUCCESS: ours(ChannelRelay.ignore_message, MSG_CHANNEL_SUCCESS),
            MSG_CHANNEL_FAILURE: ours(ChannelRelay.ignore_message, MSG_CHANNEL_FAILURE),
        }
        refused = self.transport._handler_table[MSG_CHANNEL_OPEN_FAILURE]

        def open_failure(message: paramiko.Message) -> None:
            circuit = self.transport._channels.get(message.get_int())
            if type(circuit) is ChannelRelay:
                circuit.on_refused(message.get_int())
            else:
                message.rewind()
                refused(message)

        self.transport._handler_table[MSG_CHANNEL_OPEN_FAILURE] = open_failure


class ChannelRelay:
    """One forwarded connection: a local socket and a channel. In place of a ``paramiko.Channel``, which has two pipes
    and four conditions to serve blocking readers that we do not have."""

    def __init__(self, carrier: ChannelMultiplexer, local: socket.socket, target: Target) -> None:
        self._carrier = carrier
        self._forwarder = carrier.forwarder
        self._local = local
        self._target = target
        self._lock = ThreadLock()  # for all below: both threads come here
        self._number = -1
        self._remote_number = -1  # the host's number of this channel; -1: not open yet
        self._out_window = 0
        self._out_packet = 0
        self._in_window = WINDOW
        self._uncredited = 0
        self._pending: deque[bytes] = deque()  # arrived, and the local socket had no room
        self._local_ended = False
        self._host_ended = False
        self._end_passed_on = False
        self._close_sent = False
        self._host_closed = False
        self._released = False  # the local socket is closed
        self._events = 0

    # -- in the selector's thread ------------------------------------------------------------------------------------

    def open(self) -> None:
        transport = self._carrier.transport
        self._forwarder.add_relay(self)
        with transport.lock:
            self._number = transport._next_channel()
            transport._channels.put(self._number, self)
            transport.channels_seen[self._number] = True
        if not transport.active:
            self.abort()
            return
        message = paramiko.Message()
        message.add_byte(cMSG_CHANNEL_OPEN)
        message.add_string("direct-tcpip")
        message.add_int(self._number)
        message.add_int(WINDOW)
        message.add_int(MAX_PACKET)
        message.add_string(self._target.host)
        message.add_int(self._target.port)
        message.add_string("127.0.0.1")
        message.add_int(0)
        self._carrier.send(message)
        self._carrier.start_open_timeout(self)

    def abort(self) -> None:
        """Ends both sides at once."""
        self._release(reset=True)
        self._send_close()

    def _ready(self, mask: int) -> None:
        if self._released:
            return
        if mask & WRITE:
            self._flush()
        if mask & READ:
            self._read()
        self._update()

    def _flush(self) -> None:
        """Writes what is pending, and gives the host credit for it."""
        credit = 0
        with self._lock:
            try:
                while self._pending:
                    data = self._pending[0]
                    sent = self._local.send(data)
                    credit += sent
                    if sent < len(data):
                        self._pending[0] = data[sent:]
                        break
                    self._pending.popleft()
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self._forwarder.post(self.abort)
                return
            self._uncredited += credit
        self._give_credit()

    def _give_credit(self) -> None:
        with self._lock:
            credit = self._uncredited
            if credit < CREDIT_AT or self._host_ended or self._host_closed or self._close_sent:
                return
            self._uncredited = 0
            self._in_window += credit
        message = self._message(cMSG_CHANNEL_WINDOW_ADJUST)
        message.add_int(credit)
        self._carrier.send(message)

    def _read(self) -> None:
        with self._lock:
            room = min(self._out_window, self._out_packet)
        if room <= 0 or self._local_ended or self._close_sent:
            return
        try:
            data = self._local.recv(room)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        if not data:
            self._local_ended = True
            self._carrier.send(self._message(cMSG_CHANNEL_EOF))
            return
        with self._lock:
            self._out_window -= len(data)
        message = self._message(cMSG_CHANNEL_DATA)
        message.add_string(data)
        self._carrier.send(message)

    def _update(self) -> None:
        """Brings what is watched, and what is closed, in line with the state."""
        if self._released:
            return
        with self._lock:
            empty = not self._pending
            room = self._out_window > 0
        if self._host_ended and empty and not self._end_passed_on:
            self._end_passed_on = True
            try:
                self._local.shutdown(socket.SHUT_WR)
            except OSError:
                self.abort()
                return
        if empty and (self._host_closed or (self._end_passed_on and self._local_ended)):
            # A host that closes without an end of its data first has cut it (its sshd was told to, or died).
            self._release(reset=not self._host_ended)
            self._send_close()
            return
        events = 0 if empty else WRITE
        if self._remote_number >= 0 and room and not self._local_ended and not self._host_closed:
            events |= READ
        if events != self._events:
            self._events = events
            self._forwarder.watch(self._local, events, self._ready)

    def _release(self, *, reset: bool) -> None:
        """Closes the local socket, once."""
        with self._lock:
            if self._released:
                return
            self._released = True
            self._pending.clear()
            if self._events:
                self._events = 0
                self._forwarder.watch(self._local, 0, self._ready)
            if reset:
                close_with_reset(self._local)
            else:
                self._local.close()

    def _send_close(self) -> None:
        """Tells the host, once. While the channel is not open there is nobody to tell: ``_opened`` comes here again."""
        if not self._close_sent and self._remote_number >= 0 and self._carrier.transport.active:
            self._close_sent = True
            self._carrier.send(self._message(cMSG_CHANNEL_CLOSE))
        self._forget_if_over()

    def _forget_if_over(self) -> None:
        """After the host's close nothing more can come for this number, and it may be used again."""
        transport = self._carrier.transport
        if self._released and (self._host_closed or not transport.active):
            self._carrier.cancel_open_timeout(self)
            transport._channels.delete(self._number)
            transport.channels_seen.pop(self._number, None)
            self._forwarder.discard_relay(self)

    def _opened(self) -> None:
        self._carrier.cancel_open_timeout(self)
        if self._released:
            self._send_close()
        else:
            self._update()

    def _refused(self) -> None:
        self._host_closed = True
        self._release(reset=True)
        self._forget_if_over()

    def _closed(self) -> None:
        self._update()
        self._send_close()

    def _transport_ended(self) -> None:
        self._host_closed = True
        self._release(reset=True)
        self._forget_if_over()

    def _message(self, kind: bytes) -> paramiko.Message:
        message = paramiko.Message()
        message.add_byte(kind)
        message.add_int(self._remote_number)
        return message

    # -- in the transport's thread -----------------------------------------------------------------------------------

    def _set_remote_channel(self, number: int, window: int, max_packet: int) -> None:
        """paramiko calls this when the host has opened the channel."""
        with self._lock:
            self._out_window = window
            self._out_packet = min(max_packet, MAX_PACKET)
            self._remote_number = number
        self._forwarder.post(self._opened)

    def on_refused(self, reason: int) -> None:
        self._carrier.on_refused(self._target, reason)
        self._forwarder.post(self._refused)

    def on_data(self, message: paramiko.Message) -> None:
        raw = message.asbytes()  # number, length, data; ``get_binary`` would be three calls more, for each token
        data = raw[8 : 8 + int.from_bytes(raw[4:8], "big")]
        sent = 0
        with self._lock:
            if self._released:
                return
            self._in_window -= len(data)
            if self._in_window < 0:
                self._forwarder.post(self.abort)  # the host ignores what it was granted: it would fill our memory
                return
            waiting = bool(self._pending)
            if not waiting:
                try:
                    sent = self._local.send(data)
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError:
                    self._forwarder.post(self.abort)
                    return
            if sent < len(data):
                self._pending.append(data[sent:])
            self._uncredited += sent
            credit_due = self._uncredited >= CREDIT_AT
        if sent < len(data) and not waiting:
            self._forwarder.post(self._update)
        if credit_due:
            self._forwarder.post(self._give_credit)

    def on_window_adjust(self, message: paramiko.Message) -> None:
        more = message.get_int()
        with self._lock:
            was_full = self._out_window <= 0
            self._out_window += more
        if was_full:
            self._forwarder.post(self._update)

    def on_eof(self, _: paramiko.Message) -> None:
        self._host_ended = True
        self._forwarder.post(self._update)

    def on_close(self, _: paramiko.Message) -> None:
        self._host_closed = True
        self._forwarder.post(self._closed)

    def ignore_message(self, _: paramiko.Message) -> None:
        """What has no meaning on a forwarded connection is passed over."""

    def _unlink(self) -> None:
        """paramiko calls this when the transport has ended."""
        self._forwarder.post(self._transport_ended)
