"""Makes the command line of the ``ssh`` that a person works in (`gpumesh ssh`): the node's address, its jump hosts, and
its keys. Everything else is as the person's own ssh_config has it, except forwards: those are the mesh's matter."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence

from gpumesh.topology import SshSpec
from gpumesh.tunnels.hostkeys import choose_ssh_alias
from gpumesh.tunnels.known_hosts import KnownHost
from gpumesh.tunnels.openssh.options import (
    PASSWORD_OPTIONS,
    chain_jumps,
    file_arguments,
    identity_arguments,
    login_options,
    option_arguments,
    proxy_arguments,
)

# What an alias that was made for tunnels has in ~/.ssh/config, and what a person at a terminal does not want.
_TERMINAL_OPTIONS = {"SessionType": "default", "ForkAfterAuthentication": "no", "StdinNull": "no"}


def terminal_command(
    host: KnownHost,
    ssh: SshSpec,
    command: Sequence[str] = (),
    *,
    forwards: Sequence[str] = (),
    with_terminal: bool = False,
    verbose: bool = False,
    unknown: Collection[str] = (),
) -> list[str]:
    """The arguments of ``ssh`` for a shell on the node's host, or for ``command``, whose words the host's shell reads,
    as with ssh itself. No secret is among them.

    ``forwards``: values of ssh's ``-L``. ``with_terminal``: the command gets a terminal (``-t``). ``verbose``: ssh
    shows what it does. ``unknown``: options, in lower case, that this ssh does not know. Raises ``HostKeyRevoked``,
    ``KeyUnreadable``, and ``TunnelError`` for a known_hosts file that cannot be read.
    """
    options = login_options(ssh) | {"ConnectTimeout": str(max(1, round(ssh.connect_timeout_s)))}
    if not forwards:
        options["ClearAllForwardings"] = "yes"  # the forwards of ~/.ssh/config: their ports may be the mesh's
    if ssh.alias is not None:
        options |= _TERMINAL_OPTIONS
        if command:
            options["RemoteCommand"] = "none"  # ssh refuses two commands
    if ssh.alias is not None or not _is_ip_address(ssh.host):
        options["HostName"] = ssh.host  # and not what ~/.ssh/config has for this name
    if ssh.password_env is not None:
        options |= PASSWORD_OPTIONS
    host_key_alias = choose_ssh_alias(host, ssh)
    if host_key_alias is not None:
        options["HostKeyAlias"] = host_key_alias
    arguments = ["ssh", *file_arguments(None)]
    if verbose:
        arguments.append("-v")
    if with_terminal and command:
        arguments.append("-t")
    arguments += [*option_arguments(options, unknown), *identity_arguments(ssh)]
    if ssh.proxy_jump:
        arguments += proxy_arguments(chain_jumps(ssh, login_options, unknown=unknown))
    for forward in forwards:
        arguments += ["-L", forward]
    arguments += ["-p", str(ssh.port), "-l", ssh.user, "--", ssh.alias or ssh.host]
    return [*arguments, *command]


def _is_ip_address(host: str) -> bool:
    """Whether ``host`` is an address, for which no ssh_config has another name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
