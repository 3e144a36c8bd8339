"""The permanent local ports (or Unix sockets) of a node's tunnel; during an outage their clients wait, then are reset.

Each target has one port or socket. They are bound once and stay open during a reconnect. The supervisor owns the
listening sockets and lends them to the worker that is connected. Without a worker, the kernel completes a client's
connect and the client waits in the backlog, so that a short outage is only a delay. After ``CLIENT_WAIT_S`` such
clients are accepted and reset, so that no client hangs when the host stays away. The supervisor calls the methods of
``Listeners`` when an outage begins and ends.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpumesh.errors import GPUMeshError
from gpumesh.state import LocalAccess, TunnelPhase
from gpumesh.topology import DEFAULT_TUNNELS, Target, TunnelListen, TunnelsSpec
from gpumesh.tunnels.local_system.peer_users import can_identify_peers
from gpumesh.tunnels.local_system.sockets import close_with_reset
from gpumesh.tunnels.local_system.unix_sockets import UnixListener, open_tunnel_listener
from gpumesh.tunnels.local_system.unix_urls import unix_url

CLIENT_WAIT_S = 8.0  # clients of a local port wait this long for a connection to the host; then they are reset
BACKLOG = 1024  # clients of one listener that can wait for a worker
_ACCEPTS_PER_EVENT = 64  # after this many accepts in a row, other tasks get their turn
_ACCEPT_RETRY_S = 0.1  # the pause after an accept for which the system had no descriptor or no memory


class Listeners:
    """The listening sockets, which the constructor binds: to free ports on loopback, or to Unix sockets named after
    ``mesh_name`` and ``node``.

    ``close`` releases them. The constructor raises OSError, and GPUMeshError where no Unix socket can be made.
    """

    def __init__(
        self, targets: Sequence[Target], spec: TunnelsSpec = DEFAULT_TUNNELS, *, mesh_name: str = "mesh", node: str = ""
    ) -> None:
        self._targets = tuple(targets)
        self._reset_timer: asyncio.TimerHandle | None = None  # runs until waiting clients are reset
        # The event loop that resets clients; ``None`` while clients are held.
        self._resetting_loop: asyncio.AbstractEventLoop | None = None
        self._unix_listeners: list[UnixListener] = []
        self.sockets: list[socket.socket] = []
        try:
            for number in range(len(self._targets)):
                if spec.listen is TunnelListen.UNIX:
                    unix_listener = open_tunnel_listener(mesh_name, node, number, BACKLOG)
                    self._unix_listeners.append(unix_listener)
                    self.sockets.append(unix_listener.sock)
                else:
                    self.sockets.append(_listen_on_loopback())
        except (OSError, GPUMeshError):
            self.close()
            raise
        self.ports: tuple[int, ...] = ()
        if not self._unix_listeners:
            self.ports = tuple(sock.getsockname()[1] for sock in self.sockets)
        self.paths: tuple[Path, ...] = tuple(listener.path for listener in self._unix_listeners)
        self.access = self._find_access(spec)

    def __repr__(self) -> str:
        clients = "reset" if self._resetting_loop is not None else "held"
        return f"<Listeners {', '.join(map(str, self.paths or self.ports))} clients {clients}>"

    def _find_access(self, spec: TunnelsSpec) -> LocalAccess | None:
        """Which users of this machine can connect; ``None``: there are no sockets."""
        if not self.sockets:
            return None
        if self._unix_listeners:
            return LocalAccess.OWN_USER
        if spec.share:
            return LocalAccess.ANY_USER
        # The worker refuses other users (peer_users.py) where the system shows which user has made a connection.
        return LocalAccess.OWN_USER if can_identify_peers(self.sockets[0]) else LocalAccess.UNCHECKED

    @property
    def urls(self) -> Mapping[Target, str]:
        return {target: self._url(number, target) for number, target in enumerate(self._targets)}

    def _url(self, number: int, target: Target) -> str:
        """The base URL of ``target``, which is the target with index ``number``, at its local end."""
        prefix = target.path.rstrip("/")
        if self._unix_listeners:
            return unix_url(self.paths[number], scheme=target.scheme, prefix=prefix)
        return f"{target.scheme}://127.0.0.1:{self.ports[number]}{prefix}"

    def follow_phase(self, old_phase: TunnelPhase, phase: TunnelPhase, client_wait_s: float) -> None:
        """Lets the clients wait for the first ``client_wait_s`` of an outage, and then resets them.

        Called when the tunnel's phase changes. In phase failed the outage will be long, so clients are reset at once.
        """
        if phase is TunnelPhase.UP:
            self.hold_clients()
        elif phase is TunnelPhase.FAILED:
            self.reset_clients()
        elif old_phase in (TunnelPhase.IDLE, TunnelPhase.UP) and phase is not TunnelPhase.CLOSED:
            # The outage begins now; the time before the first connection counts as an outage too. The later phases of
            # an outage (backoff, connecting) do not start the time again.
            self.reset_clients_after(client_wait_s)

    def hold_clients(self) -> None:
        """Makes clients wait in the backlog until a worker accepts them."""
        self._cancel_timer()
        if self._resetting_loop is not None:
            for listener in self.sockets:
                self._resetting_loop.remove_reader(listener)
            self._resetting_loop = None

    def reset_clients_after(self, delay_s: float = CLIENT_WAIT_S) -> None:
        """Calls ``reset_clients`` after ``delay_s``, unless ``hold_clients`` is called before."""
        self._cancel_timer()
        self._reset_timer = asyncio.get_running_loop().call_later(delay_s, self.reset_clients)

    def reset_clients(self) -> None:
        """Resets the clients that wait, and from now on every new client: a balancer wants failures to be fast."""
        self._cancel_timer()
        if self._resetting_loop is None:
            self._resetting_loop = asyncio.get_running_loop()
            for listener in self.sockets:
                self._watch_to_reset(listener)

    def close(self) -> None:
        self.hold_clients()  # ends the timer and the watches
        for unix_listener in self._unix_listeners:
            unix_listener.close()
        for listener in self.sockets:
            listener.close()

    def _watch_to_reset(self, listener: socket.socket) -> None:
        """Resets the clients of ``listener`` as they come. Does nothing if clients are held, perhaps since the pause
        after which this was called."""
        if self._resetting_loop is not None:
            self._resetting_loop.add_reader(listener, self._reset_waiting_clients, listener)

    def _reset_waiting_clients(self, listener: socket.socket) -> None:
        """Accepts and resets the clients that wait at ``listener``, at most ``_ACCEPTS_PER_EVENT`` in one call."""
        for _ in range(_ACCEPTS_PER_EVENT):
            try:
                client, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # no client waits any more
                return
            except OSError:
                # No descriptor or memory is left. The listener stays readable, so its watch would call this again at
                # once, and keep the processor busy.
                if self._resetting_loop is not None:
                    self._resetting_loop.remove_reader(listener)
                    self._resetting_loop.call_later(_ACCEPT_RETRY_S, self._watch_to_reset, listener)
                return
            close_with_reset(client)

    def _cancel_timer(self) -> None:
        if self._reset_timer is not None:
            self._reset_timer.cancel()
            self._reset_timer = None


def _listen_on_loopback() -> socket.socket:
    """A new non-blocking listener at a free port of 127.0.0.1."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind(("127.0.0.1", 0))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
