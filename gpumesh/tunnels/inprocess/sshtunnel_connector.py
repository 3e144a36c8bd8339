"""Uses the library sshtunnel for transport ``sshtunnel``, with our own connecting and forwarding inside it.

sshtunnel owns the gateway object: it starts and stops one server for each forward, and the servers' threads. We
replaced four parts, each for a reason (docs/internals/tunnels.md has the measurements):

- *Connecting and logging in*: sshtunnel has no deadline, and turns DNS, host-key and authentication failures into one
  generic error. It gets a paramiko transport that handshake.py and authentication.py have made.
- *The check of tunnels* can block for 11 s. It is skipped; the supervisor pings the host instead.
- *Forwarding*: sshtunnel has a thread for each connection and a listen backlog of 5. It gets our forwarder as its
  server.
- *Nagle's algorithm*: sshtunnel leaves it on at all three sockets, which delays each answer by 40 ms. opening.py and
  forwarder.py turn it off.

If paramiko lacks the private parts that our channels need, sshtunnel's own servers are used as a fallback, with their
relaying and their backlog corrected.
"""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Callable, Sequence
from typing import Any

import paramiko
import sshtunnel

from gpumesh.topology import SshSpec, Target
from gpumesh.tunnels.forwarder import BACKLOG, Forwarder, PeerFilter
from gpumesh.tunnels.inprocess import channel_multiplexer
from gpumesh.tunnels.inprocess.channel_multiplexer import ChannelMultiplexer, OnChannelRefused
from gpumesh.tunnels.local_system.sockets import close_with_reset, disable_nagle, reset_on_close

_silent_log = logging.getLogger("gpumesh.sshtunnel")
_silent_log.addHandler(logging.NullHandler())
_silent_log.propagate = False

RELAY_CHUNK_BYTES = 16 * 1024  # the most that one read of ``_relay`` takes
RELAY_POLL_S = 5.0  # a channel that closed without an event is noticed within this time


class TransportForwarder(sshtunnel.SSHTunnelForwarder):  # type: ignore[misc]  # sshtunnel has no types
    """sshtunnel's forwarder with a given transport and given listening sockets. ``start`` and ``stop`` are
    sshtunnel's."""

    def __init__(
        self,
        transport: paramiko.Transport,
        ssh: SshSpec,
        routes: Sequence[tuple[socket.socket, Target]],
        on_refused: OnChannelRefused,
        on_end: Callable[[], None],
        make_peer_filter: Callable[[], PeerFilter | None],
    ) -> None:
        """``routes``: pairs of a listener and its target; there is at least one pair.

        ``make_peer_filter`` is called once for each thread that accepts. ``on_refused`` and ``on_end`` are called in
        other threads.
        """
        self._given_transport = transport
        self._make_peer_filter = make_peer_filter
        self._routes = routes
        self._on_refused = on_refused
        self._on_end = on_end
        self.multiplexer: ChannelMultiplexer | None = None  # made by ``start``; never in the fallback
        self.uses_channels = channel_multiplexer.find_missing_feature(transport) is None
        self.skip_tunnel_checkup = True
        # The transport is logged in, so sshtunnel must not look for a configuration, an agent or keys, nor ping.
        super().__init__(
            (ssh.host, ssh.port),
            ssh_config_file=None,
            ssh_username=ssh.user,
            ssh_password="-",  # noqa: S106 - sshtunnel requires a password; authentication.py has logged in
            allow_agent=False,
            host_pkey_directories=[],
            remote_bind_addresses=[(target.host, target.port) for _, target in routes],
            local_bind_addresses=[_local_address(listener) for listener, _ in routes],
            set_keepalive=0.0,
            logger=_silent_log,
        )

    # -- methods of sshtunnel that are replaced ----------------------------------------------------------------------

    def _connect_to_gateway(self) -> None:
        self._transport = self._given_transport

    def _create_tunnels(self) -> None:
        """Makes the servers that forward: one for all routes, or in the fallback one for each route."""
        self._connect_to_gateway()
        if self.uses_channels:
            forwarder = Forwarder(self._on_end, peer_filter=self._make_peer_filter())
            self.multiplexer = multiplexer = ChannelMultiplexer(self._transport, forwarder, self._on_refused)
            for listener, target in self._routes:
                forwarder.listen(listener, multiplexer.make_dialer(target))
            first_listener, _target = self._routes[0]
            _host, first_port = _local_address(first_listener)
            self._add_server(_ForwarderServer(forwarder, first_port))
        else:
            for listener, target in self._routes:
                handler = self._make_ssh_forward_handler_class((target.host, target.port))
                self._add_server(_FallbackServer(listener, handler, self.logger, self._make_peer_filter()))

    def _add_server(self, server: Any) -> None:
        self._server_list.append(server)
        self.tunnel_is_up[server.local_address] = False

    def _make_ssh_forward_handler_class(self, remote_address_: tuple[str, int]) -> Any:
        """Returns the class that handles the connections of a ``_FallbackServer``: sshtunnel's, with our relaying."""

        class Handler(super()._make_ssh_forward_handler_class(remote_address_)):  # type: ignore[misc]
            def setup(self) -> None:
                disable_nagle(self.request)

            def _redirect(self, chan: paramiko.Channel) -> None:
                _relay(self.request, chan)

        return Handler


class _ForwarderServer:
    """Our forwarder with the interface of a socketserver, which sshtunnel expects. sshtunnel makes the thread.

    ``port`` is only the server's name in sshtunnel's tables.
    """

    daemon_threads = True

    def __init__(self, forwarder: Forwarder, port: int) -> None:
        self._forwarder = forwarder
        self.local_port = port
        self.local_host = "127.0.0.1"
        self.local_address = self.remote_address = (self.local_host, port)

    def serve_forever(self, _: float) -> None:
        self._forwarder.run()

    def shutdown(self) -> None:
        self._forwarder.close()

    def server_close(self) -> None:
        """Does nothing: the listening sockets are the supervisor's."""


class _FallbackServer(sshtunnel._ThreadingForwardServer):  # type: ignore[misc]  # sshtunnel has no types
    """sshtunnel's own server on one of our listening sockets, for a paramiko that lacks a part that we need."""

    request_queue_size = BACKLOG

    def __init__(
        self, listener: socket.socket, handler: Any, logger: logging.Logger, peer_filter: PeerFilter | None
    ) -> None:
        # The address is a placeholder: this server gets a socket that listens already.
        super().__init__(("127.0.0.1", 0), handler, bind_and_activate=False, logger=logger)
        self._peer_filter = peer_filter
        self.socket.close()  # the socket that sshtunnel's constructor made
        self.socket: socket.socket = listener.dup()
        self.server_address = _local_address(listener)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Returns whether the connection is served. Resets the connection of another user, and returns false.

        Called by socketserver in the thread that accepts.
        """
        if self._peer_filter is None or self._peer_filter.allows(request, client_address):
            return True
        close_with_reset(request)
        return False

    def server_close(self) -> None:
        super().server_close()
        if self._peer_filter is not None:
            self._peer_filter.close()


def _relay(local: socket.socket, channel: paramiko.Channel) -> None:
    """Passes bytes in both directions until both have ended. Blocks: runs in the connection's own thread.

    sshtunnel's own relaying ends both directions when one ends, and makes a cut answer look whole.
    """
    open_ends: set[socket.socket | paramiko.Channel] = {local, channel}  # the ends that have not sent their last byte
    # After the host's end, the client's bytes still go to the host, until one of the two has closed.
    while channel in open_ends or (local in open_ends and not channel.closed):
        ready, _, _ = select.select(list(open_ends), [], [], RELAY_POLL_S)
        for source, sink in ((local, channel), (channel, local)):
            if source not in ready:
                continue
            if data := source.recv(RELAY_CHUNK_BYTES):
                sink.sendall(data)
                continue
            # ``source`` sends no more bytes. A channel that ended without EOF: the host has cut the answer.
            if source is channel and not channel.eof_received:
                reset_on_close(local)
                return
            open_ends.discard(source)
            sink.shutdown(socket.SHUT_WR)


def _local_address(listener: socket.socket) -> tuple[str, int]:
    """The address of a listener in sshtunnel's form. A Unix socket gets port 0."""
    return ("127.0.0.1", 0 if listener.family == socket.AF_UNIX else listener.getsockname()[1])
