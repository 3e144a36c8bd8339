"""Makes the ``ConnectRequest`` for one attempt to connect to an SSH node: its current address, secrets, socket
folder."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from gpumesh import config
from gpumesh.config import providers
from gpumesh.errors import TransportUnsupported
from gpumesh.topology import SshSpec, Target, TransportKind
from gpumesh.tunnels.address_command import ask_address
from gpumesh.tunnels.local_system.socket_folders import private_folder
from gpumesh.tunnels.transport import ConnectRequest


@contextlib.asynccontextmanager
async def open_connect_request(
    node: str, ssh: SshSpec, targets: tuple[Target, ...], *, interactive: bool, share: bool
) -> AsyncIterator[ConnectRequest]:
    """The request for one attempt. At the end of the block its folder for sockets, which only transport openssh needs,
    is removed.

    Raises SecretMissing, HostUnresolved (address_from), TransportUnsupported (a host that cannot carry a tunnel), and
    GPUMeshError when no folder can be made.
    """
    ssh = await resolve_address(node, ssh)
    with contextlib.ExitStack() as stack:
        control_dir: str | None = None
        secrets = read_secrets(node, ssh)
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
        )


async def resolve_address(node: str, ssh: SshSpec) -> SshSpec:
    """``ssh`` with the address that the command ``address_from`` prints, if the spec has one. Raises HostUnresolved,
    and TransportUnsupported for a proxy that gives terminals only."""
    if ssh.address_from is not None:
        host, port = await ask_address(ssh.address_from, default_port=ssh.port, node=node)
        ssh = replace(ssh, host=host, port=port)
    proxy = providers.describe_terminal_proxy(ssh.host)
    if proxy is not None:
        raise TransportUnsupported(proxy, hint=providers.EXPOSED_TCP_HINT, node=node)
    return ssh


def read_secrets(node: str, ssh: SshSpec) -> tuple[tuple[str, str], ...]:
    """Pairs of a name and a secret: ``password`` and ``passphrase``, each if the spec names its variable. Raises
    SecretMissing."""
    return tuple(
        (name, config.read_secret(variable, node=node))
        for name, variable in (("password", ssh.password_env), ("passphrase", ssh.passphrase_env))
        if variable is not None
    )
