"""Which transport a kind means: the one place that maps it to its ``connect`` and its ``fetch_host_key``.

Each is imported on use: paramiko takes a third of a second to load, which only its own transport needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpumesh.topology import SshSpec, TransportKind

if TYPE_CHECKING:
    from gpumesh.tunnels.hostkeys import HostKey
    from gpumesh.tunnels.transport import ConnectFunction


def load_connect(transport: TransportKind) -> ConnectFunction:
    """The function that makes a connection of this transport."""
    if transport is TransportKind.OPENSSH:
        from gpumesh.tunnels.openssh import connection as openssh_connection

        return openssh_connection.connect
    from gpumesh.tunnels.inprocess import connection as inprocess_connection

    return inprocess_connection.connect


async def fetch_host_key(
    node: str, ssh: SshSpec, *, secrets: tuple[tuple[str, str], ...] = (), timeout_s: float = 10.0
) -> HostKey:
    """The key that the host shows now, trusted or not: for ``gpumesh trust``, which shows it and may ``record`` it.

    Nothing is sent to the host but the key exchange; jump hosts, which have to be trusted, are logged in to. By the
    node's own transport: behind a ProxyCommand only that gets there. Raises ``TunnelError``.
    """
    if ssh.transport is TransportKind.OPENSSH:
        from gpumesh.tunnels.openssh import connection as openssh_connection

        return await openssh_connection.fetch_host_key(node, ssh, secrets=secrets, timeout_s=timeout_s)
    from gpumesh.tunnels.inprocess import connection as inprocess_connection

    return await inprocess_connection.fetch_host_key(node, ssh, secrets=secrets, timeout_s=timeout_s)
