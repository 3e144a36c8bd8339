"""The only place that maps a ``TransportKind`` to the ``connect`` and the ``fetch_host_key`` of its transport.

Each transport is imported on use: paramiko takes a third of a second to load, and only transport sshtunnel needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpumesh.topology import SshSpec, TransportKind

if TYPE_CHECKING:
    from gpumesh.tunnels.known_hosts import HostKey
    from gpumesh.tunnels.transport import ConnectFunction


def load_connect(transport: TransportKind) -> ConnectFunction:
    """Returns the function that makes a connection over ``transport``."""
    if transport is TransportKind.OPENSSH:
        from gpumesh.tunnels.openssh import connection as openssh_connection

        return openssh_connection.connect
    from gpumesh.tunnels.inprocess import connection as inprocess_connection

    return inprocess_connection.connect


async def fetch_host_key(
    node: str, ssh: SshSpec, *, mesh: str = "", secrets: tuple[tuple[str, str], ...] = (), timeout_s: float = 10.0
) -> HostKey:
    """Returns the key that the host shows now, trusted or not. ``gpumesh trust`` shows the key and may record it.

    The host gets a key exchange and no login. Jump hosts get a login, so their keys must be trusted already. The
    node's own transport is used: behind a ProxyCommand no other transport reaches the host. ``mesh`` is the
    ``Topology.identity`` of the node's mesh. Raises ``TunnelError``.
    """
    if ssh.transport is TransportKind.OPENSSH:
        from gpumesh.tunnels.openssh import host_key_fetch as openssh_host_key_fetch

        return await openssh_host_key_fetch.fetch_host_key(node, ssh, mesh=mesh, secrets=secrets, timeout_s=timeout_s)
    from gpumesh.tunnels.inprocess import opening as inprocess_opening

    return await inprocess_opening.fetch_host_key(node, ssh, mesh=mesh, secrets=secrets, timeout_s=timeout_s)
