"""Makes the ``ConnectRequest`` for one attempt to connect to an SSH node: address now, secrets, folder for sockets.

Also reads the recorded host keys of the host that such a request has reached.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from gpumesh import config
from gpumesh.config import providers
from gpumesh.errors import TransportUnsupported, TunnelError
from gpumesh.topology import SshSpec, Target, TransportKind
from gpumesh.tunnels.address_command import ask_address
from gpumesh.tunnels.known_hosts import read_known_hosts
from gpumesh.tunnels.local_system.socket_folders import private_folder
from gpumesh.tunnels.transport import ConnectRequest, ReverseForward


@contextlib.asynccontextmanager
async def open_connect_request(
    node: str,
    ssh: SshSpec,
    targets: tuple[Target, ...],
    *,
    interactive: bool,
    share: bool,
    mesh: str = "",
    without_session: bool = False,
    reverse_forwards: tuple[ReverseForward, ...] = (),
) -> AsyncIterator[ConnectRequest]:
    """Gives the block the request for one attempt to connect to ``node``. The end of the block removes the folder for
    sockets, which only a request for transport openssh has. ``ConnectRequest`` explains ``interactive``, ``share``,
    ``mesh``, ``without_session`` and ``reverse_forwards``.

    Raises SecretMissing, HostUnresolved (address_from), TransportUnsupported (a host that cannot carry a tunnel), and
    GPUMeshError when no folder can be made.
    """
    ssh = await resolve_address(node, ssh)
    with contextlib.ExitStack() as stack:
        secrets = read_secrets(node, ssh)
        control_dir: str | None = None
        if ssh.transport is TransportKind.OPENSSH:
            control_dir = str(stack.enter_context(private_folder()))
        yield ConnectRequest(
            node=node,
            ssh=ssh,
            targets=targets,
            secrets=secrets,
            interactive=interactive,
            control_dir=control_dir,
            share=share,
            mesh=mesh,
            without_session=without_session,
            reverse_forwards=reverse_forwards,
        )


async def resolve_address(node: str, ssh: SshSpec) -> SshSpec:
    """Returns ``ssh`` with the address that its command ``address_from`` prints; unchanged if it has no such command.

    Raises HostUnresolved, and TransportUnsupported for a host that is a provider's proxy for terminals only.
    """
    if ssh.address_from is not None:
        host, port = await ask_address(ssh.address_from, default_port=ssh.port, node=node)
        ssh = replace(ssh, host=host, port=port)
    proxy = providers.describe_terminal_proxy(ssh.host)
    if proxy is not None:
        raise TransportUnsupported(proxy, hint=providers.EXPOSED_TCP_HINT, node=node)
    return ssh


def read_secrets(node: str, ssh: SshSpec) -> tuple[tuple[str, str], ...]:
    """Returns pairs of a name (``password``, ``passphrase``) and the secret, for the secrets whose variable the spec
    names. Raises SecretMissing when such a variable is not set."""
    variables = {"password": ssh.password_env, "passphrase": ssh.passphrase_env}
    return tuple(
        (name, config.read_secret(variable, node=node)) for name, variable in variables.items() if variable is not None
    )


def recorded_fingerprints(setup: ConnectRequest) -> tuple[str, ...]:
    """The fingerprints of the keys on record for the host; empty when the file cannot be read now. The host has shown
    one of these keys: otherwise there would be no connection."""
    try:
        keys = read_known_hosts(*setup.ssh.known_hosts_files).keys(setup.known_host)
    except TunnelError:  # the file was readable a moment ago, for the connect; its loss must not end the connection
        return ()
    return tuple(key.fingerprint for key in keys)
