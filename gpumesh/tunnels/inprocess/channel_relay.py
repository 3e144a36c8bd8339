"""Forwards one connection over a channel of a paramiko transport, without a thread of its own, with back-pressure.

Two threads work here. The *transport's* thread (paramiko's own, one for each SSH connection) reads packets. It writes
the data of a channel to the local socket at once, without blocking. The *selector's* thread (forwarder.py) does the
rest: it reads local sockets, writes the data for which a slow client had no room, and sends every packet. The
transport's thread never sends, so it never waits: neither for a full SSH socket (both ends of a connection would then
wait for each other) nor for a key exchange (which only that thread can finish).

Back-pressure: the host gets window credit only for bytes that the local socket has taken. So a client that reads slowly
stops the host, and at most ``WINDOW`` bytes per channel are held here. In the other direction a local socket is read
only as far as the host's window allows.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Any, Protocol

import paramiko
from paramiko.common import (
    cMSG_CHANNEL_CLOSE,
    cMSG_CHANNEL_DATA,
    cMSG_CHANNEL_EOF,
    cMSG_CHANNEL_OPEN,
    cMSG_CHANNEL_WINDOW_ADJUST,
)

from gpumesh.topology import Target
from gpumesh.tunnels.blocking import ThreadLock
from gpumesh.tunnels.forwarder import READ, WRITE, Forwarder
from gpumesh.tunnels.local_system.sockets import close_with_reset

WINDOW = 1 << 20  # bytes that the host may send before we have passed them on; allows 10 MB/s at a round trip of 100 ms
MAX_PACKET = 1 << 15  # bytes of data in a packet; as paramiko and OpenSSH have it
MIN_CREDIT = WINDOW // 8  # bytes; the host gets credit in pieces of this size or more, not one message for each packet


class Multiplexer(Protocol):
    """The part of ``channel_multiplexer.ChannelMultiplexer`` that a relay uses."""

    transport: Any
    forwarder: Forwarder

    def send(self, message: paramiko.Message) -> None: ...

    def report_refused(self, target: Target, reason: int) -> None: ...

    def start_open_timeout(self, relay: ChannelRelay) -> None: ...

    def cancel_open_timeout(self, relay: ChannelRelay) -> None: ...


class ChannelRelay:
    """One forwarded connection: a local socket and a channel of the transport to ``target``.

    A relay replaces a ``paramiko.Channel``, which has two pipes and four conditions for blocking readers. paramiko
    itself calls ``_set_remote_channel`` and ``_unlink``.
    """

    def __init__(self, multiplexer: Multiplexer, local: socket.socket, target: Target) -> None:
        self._multiplexer = multiplexer
        self._forwarder = multiplexer.forwarder
        self._local = local
        self._target = target
        self._lock = ThreadLock()  # for the fields below, which both threads use
        self._number = self._remote_number = -1  # ours and the host's number of this channel; -1: not open yet
        self._send_window = 0  # bytes that we may still send
        self._send_packet_limit = 0  # bytes of data in one packet to the host
        self._receive_window = WINDOW  # bytes that the host may still send
        self._uncredited = 0  # bytes that the local socket has taken, and for which the host has no credit yet
        self._pending: deque[bytes] = deque()  # the host's data for which the local socket had no room yet
        self._local_ended = False  # the client has sent its last byte
        self._host_ended = False  # the host has sent its last byte
        self._end_written = False  # the client has got the host's EOF
        self._close_sent = False  # we have sent CHANNEL_CLOSE
        self._host_closed = False  # the host has sent CHANNEL_CLOSE, or there is no channel any more
        self._local_closed = False
        self._events = 0  # the events (READ, WRITE) for which the selector watches the local socket

    def __repr__(self) -> str:
        state = "OPENING" if self._remote_number < 0 else "OPEN"
        if self._local_closed:
            state = "CLOSED"
        return f"<ChannelRelay {self._number} to {self._target.host}:{self._target.port} {state}>"

    # -- in the selector's thread ------------------------------------------------------------------------------------

    def open(self) -> None:
        """Asks the host for the channel. Aborts if the transport has ended, or if no answer comes in time."""
        transport = self._multiplexer.transport
        self._forwarder.add_relay(self)
        self._number = register_channel(transport, self)
        # Checked when the relay is in the map: a transport that ends after that calls ``_unlink``, and a transport that
        # ended before is noticed here.
        if not transport.active:
            self.abort()
            return
        self._multiplexer.send(_make_open_message(self._number, self._target))
        self._multiplexer.start_open_timeout(self)

    def abort(self) -> None:
        """Ends both sides at once: resets the local socket, and closes the channel."""
        self._close_local(reset=True)
        self._send_close()

    def _on_ready(self, ready_events: int) -> None:
        """Called when the local socket is ready for ``ready_events`` (READ, WRITE): writes first, then reads."""
        if self._local_closed:
            return
        if ready_events & WRITE:
            self._write_pending()
        if ready_events & READ:
            self._read_local()
        self._update()

    def _write_pending(self) -> None:
        """Writes pending data to the local socket, and gives the host credit for the bytes that were written."""
        with self._lock:
            try:
                self._uncredited += _write_pieces(self._local, self._pending)
            except OSError:  # the client has gone
                # ``abort`` takes the lock that is held here, so it must be called later.
                self._forwarder.post(self.abort)
                return
        self._send_credit()

    def _send_credit(self) -> None:
        """Lets the host send as many more bytes as the local socket has taken, if that is at least ``MIN_CREDIT``.

        Does nothing when the host sends no more data, or when we have closed the channel and so may not send for it.
        """
        with self._lock:
            credit = self._uncredited
            if credit < MIN_CREDIT or self._host_ended or self._host_closed or self._close_sent:
                return
            self._uncredited = 0
            self._receive_window += credit
        message = _make_message(cMSG_CHANNEL_WINDOW_ADJUST, self._remote_number)
        message.add_int(credit)
        self._multiplexer.send(message)

    def _read_local(self) -> None:
        """Reads from the local socket, as far as the host's window allows, and sends the host the bytes or the end."""
        with self._lock:
            room = min(self._send_window, self._send_packet_limit)
        # The host takes no more bytes now, the client sends no more, or we may not send for the channel any more.
        if room <= 0 or self._local_ended or self._close_sent:
            return
        try:
            data = self._local.recv(room)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the client has reset the connection
            self.abort()
            return
        if not data:  # the client has sent its last byte
            self._local_ended = True
            self._multiplexer.send(_make_message(cMSG_CHANNEL_EOF, self._remote_number))
            return
        with self._lock:
            self._send_window -= len(data)
        message = _make_message(cMSG_CHANNEL_DATA, self._remote_number)
        message.add_string(data)
        self._multiplexer.send(message)

    def _update(self) -> None:
        """Passes the host's end or close on to the client once all data is written, and otherwise watches the local
        socket for the events that are wanted now."""
        if self._local_closed:
            return
        with self._lock:
            all_written = not self._pending
            host_has_room = self._send_window > 0
        if self._host_ended and all_written and not self._end_written:  # the client does not know of the end yet
            self._end_written = True
            try:
                self._local.shutdown(socket.SHUT_WR)
            except OSError:  # the client has reset the connection
                self.abort()
                return
        # Nothing more can come: the host has closed the channel, or both sides have sent their last byte.
        if all_written and (self._host_closed or (self._end_written and self._local_ended)):
            # A host that closes without EOF has cut its data: its sshd was stopped, or died.
            self._close_local(reset=not self._host_ended)
            self._send_close()
            return
        events = 0 if all_written else WRITE
        # The client's next bytes can go to the host: the channel is open in this direction, and its window has room.
        if self._remote_number >= 0 and host_has_room and not self._local_ended and not self._host_closed:
            events |= READ
        if events != self._events:
            self._events = events
            self._forwarder.watch(self._local, events, self._on_ready)

    def _close_local(self, *, reset: bool) -> None:
        """Closes the local socket, unless it is closed already. ``reset``: the client gets a reset and not an ordinary
        end, so that a cut answer does not look whole."""
        with self._lock:
            if self._local_closed:
                return
            self._local_closed = True
            self._pending.clear()
            if self._events:
                self._events = 0
                self._forwarder.watch(self._local, 0, self._on_ready)  # 0 ends the watch
            if reset:
                close_with_reset(self._local)
            else:
                self._local.close()

    def _send_close(self) -> None:
        """Sends CHANNEL_CLOSE, once, and removes the channel if both sides are now closed.

        A channel that the host has not opened yet has no number to send: then ``_on_opened`` calls this again.
        """
        if not self._close_sent and self._remote_number >= 0 and self._multiplexer.transport.active:
            self._close_sent = True
            self._multiplexer.send(_make_message(cMSG_CHANNEL_CLOSE, self._remote_number))
        self._remove_if_closed()

    def _remove_if_closed(self) -> None:
        """Removes the channel from paramiko's map if both sides are closed, because then no packet can come for it."""
        transport = self._multiplexer.transport
        if self._local_closed and (self._host_closed or not transport.active):  # its end closes the host's side too
            self._multiplexer.cancel_open_timeout(self)
            transport._channels.delete(self._number)
            transport.channels_seen.pop(self._number, None)
            self._forwarder.discard_relay(self)

    def _on_opened(self) -> None:
        """Called when the host has opened the channel: starts to forward, or closes the channel if the local socket was
        closed meanwhile."""
        self._multiplexer.cancel_open_timeout(self)
        if self._local_closed:
            self._send_close()
        else:
            self._update()

    def _on_ended_by_host(self) -> None:
        """Resets the client: the host has refused the channel, or the transport has ended."""
        self._host_closed = True
        self._close_local(reset=True)
        self._remove_if_closed()

    def _on_host_closed(self) -> None:
        """Closes the local socket as soon as all data is written, and answers the host's CHANNEL_CLOSE now."""
        self._update()
        self._send_close()

    # -- in the transport's thread -----------------------------------------------------------------------------------

    def _set_remote_channel(self, number: int, window: int, max_packet: int) -> None:
        """Called by paramiko when the host has opened the channel. ``number``: the host's number of the channel."""
        with self._lock:
            self._send_window = window
            self._send_packet_limit = min(max_packet, MAX_PACKET)
            self._remote_number = number
        self._forwarder.post(self._on_opened)

    def on_refused(self, reason: int) -> None:
        """Called when the host did not open the channel. ``reason``: a code of RFC 4254, section 5.1."""
        self._multiplexer.report_refused(self._target, reason)
        self._forwarder.post(self._on_ended_by_host)

    def on_data(self, message: paramiko.Message) -> None:
        """Writes the host's data to the local socket; the bytes for which there is no room wait in ``_pending``."""
        # The bytes: 4 channel number, 4 length, data. ``get_binary`` would cost three more calls for each token.
        raw = message.asbytes()
        data = raw[8 : 8 + int.from_bytes(raw[4:8], "big")]
        sent = 0
        with self._lock:
            if self._local_closed:
                return
            self._receive_window -= len(data)
            if self._receive_window < 0:
                self._forwarder.post(self.abort)  # the host ignores the window: it could fill our memory
                return
            had_pending = bool(self._pending)
            if not had_pending:
                try:
                    sent = self._local.send(data)
                except (BlockingIOError, InterruptedError):
                    pass  # the socket has no room: nothing is sent
                except OSError:  # the client has gone
                    self._forwarder.post(self.abort)
                    return
            if sent < len(data):
                self._pending.append(data[sent:])
            self._uncredited += sent
            credit_due = self._uncredited >= MIN_CREDIT
        if sent < len(data) and not had_pending:  # otherwise the socket is already watched for WRITE
            self._forwarder.post(self._update)
        if credit_due:
            self._forwarder.post(self._send_credit)

    def on_window_adjust(self, message: paramiko.Message) -> None:
        """Called when the host takes more bytes. If it took none before, the local socket is watched for READ again."""
        credit = message.get_int()
        with self._lock:
            was_exhausted = self._send_window <= 0
            self._send_window += credit
        if was_exhausted:
            self._forwarder.post(self._update)

    def on_eof(self, _: paramiko.Message) -> None:
        """Called when the host has sent its last byte; the host may still receive."""
        self._host_ended = True
        self._forwarder.post(self._update)

    def on_close(self, _: paramiko.Message) -> None:
        """Called when the host has closed the channel in both directions."""
        self._host_closed = True
        self._forwarder.post(self._on_host_closed)

    def _unlink(self) -> None:
        """Called by paramiko when the transport has ended."""
        self._forwarder.post(self._on_ended_by_host)


def register_channel(transport: Any, relay: ChannelRelay) -> int:
    """Puts the relay into paramiko's map of channels, and returns the channel's new number."""
    with transport.lock:
        number: int = transport._next_channel()
        transport._channels.put(number, relay)
        transport.channels_seen[number] = True  # without this, a late packet for the channel ends the transport
    return number


def _write_pieces(sock: socket.socket, pieces: deque[bytes]) -> int:
    """Writes as much as ``sock`` has room for, removes it from ``pieces``, and returns the number of bytes.

    Raises OSError.
    """
    written = 0
    while pieces:
        piece = pieces[0]
        try:
            sent = sock.send(piece)
        except (BlockingIOError, InterruptedError):  # the socket has no more room
            break
        written += sent
        if sent < len(piece):
            pieces[0] = piece[sent:]
            break
        pieces.popleft()
    return written


def _make_open_message(number: int, target: Target) -> paramiko.Message:
    """Makes CHANNEL_OPEN of type direct-tcpip (RFC 4254, sections 5.1 and 7.2). ``number``: our channel's number."""
    message = paramiko.Message()
    message.add_byte(cMSG_CHANNEL_OPEN)
    message.add_string("direct-tcpip")
    message.add_int(number)
    message.add_int(WINDOW)
    message.add_int(MAX_PACKET)
    message.add_string(target.host)
    message.add_int(target.port)
    message.add_string("127.0.0.1")  # the address and port of the originator: the host need not know the client's
    message.add_int(0)
    return message


def _make_message(message_type: bytes, remote_number: int) -> paramiko.Message:
    """A message for an open channel: its type and the host's number of the channel. The caller adds the rest."""
    message = paramiko.Message()
    message.add_byte(message_type)
    message.add_int(remote_number)
    return message
