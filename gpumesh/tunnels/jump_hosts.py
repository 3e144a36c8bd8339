"""Parses jump hosts (``proxy_jump``) in the form of mesh.yaml and ssh_config, and lists the hosts of a route. Pure."""

from __future__ import annotations

from dataclasses import replace

from gpumesh.topology import SshSpec


def split_jump(jump: str, default_user: str) -> tuple[str, str, int]:
    """Splits ``[user@]host[:port]`` into user (if missing: ``default_user``), host, and port (if missing: 22).

    Raises ``ValueError`` if the host is empty or the port is no number.
    """
    user, _, rest = jump.rpartition("@")
    if rest.startswith("["):
        host, _, after_bracket = rest[1:].partition("]")
        port = after_bracket.removeprefix(":")
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    else:  # no port; several colons are an IPv6 address without brackets
        host, port = rest, ""
    if not host:
        raise ValueError(f"not a jump host: {jump!r}")
    port_number = int(port) if port else 22
    return user or default_user, host, port_number


def list_hops(ssh: SshSpec) -> tuple[SshSpec, ...]:
    """All hosts on the route to ``ssh``'s host, the nearest first. Each host is reached through the hosts before it;
    the last is ``ssh`` itself."""
    hops = []  # like ``ssh``, without its alias and its address command, which are for the node's own host
    for index, jump in enumerate(ssh.proxy_jump):
        user, host, port = split_jump(jump, ssh.user)
        earlier_jumps = ssh.proxy_jump[:index]
        hops.append(
            replace(ssh, host=host, port=port, user=user, proxy_jump=earlier_jumps, alias=None, address_from=None)
        )
    return (*hops, ssh)
