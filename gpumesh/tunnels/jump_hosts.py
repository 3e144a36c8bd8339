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
    return (*(_make_hop(ssh, index) for index in range(len(ssh.proxy_jump))), ssh)


def _make_hop(ssh: SshSpec, index: int) -> SshSpec:
    """The jump host with this index: like ``ssh``, without what is for the node's own host only, and with what
    ``~/.ssh/config`` has for the jump host."""
    user, host, port = split_jump(ssh.proxy_jump[index], ssh.user)
    hop = replace(
        ssh,
        host=host,
        port=port,
        user=user,
        proxy_jump=ssh.proxy_jump[:index],
        jump_aliases=ssh.jump_aliases[:index],
        alias=None,
        keys_of_alias=False,
        address_from=None,
    )
    alias = ssh.jump_aliases[index] if ssh.jump_aliases else None
    if alias is None:
        return hop
    hop = replace(hop, alias=alias.name)
    if alias.identity_files:
        hop = replace(hop, identity_files=alias.identity_files, keys_of_alias=True)
    if alias.known_hosts:
        hop = replace(hop, known_hosts=alias.known_hosts[0], more_known_hosts=alias.known_hosts[1:])
    return hop
