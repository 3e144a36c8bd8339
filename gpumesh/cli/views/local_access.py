"""Describes which users of this machine can connect to the gateway, and to the local ends of the tunnels."""

from __future__ import annotations

from collections.abc import Iterator

from gpumesh.cli.views.safe_text import clean_line
from gpumesh.state import LocalAccess, MeshState, NodeState

OPEN_GATEWAY = "every user of this machine can use it: no key is asked for"
_GATEWAY_SENTENCES = {
    LocalAccess.ANY_USER: f"{OPEN_GATEWAY} (`gateway.api_key_env` names one, `listen: unix:PATH` keeps others out)",
    LocalAccess.OWN_USER: "for your own user and root",
    LocalAccess.KEY: "for whoever sends the key",
}
_TUNNEL_SENTENCES = {
    LocalAccess.OWN_USER: "for your own user and root",
    LocalAccess.ANY_USER: "every user of this machine can use it (`tunnels.share`)",
    LocalAccess.UNCHECKED: "every user of this machine can use it: this system does not tell whose a connection is"
    " (`tunnels: {listen: unix}` keeps others out)",
}


def access_lines(state: MeshState) -> Iterator[str]:
    """Yields a line for the gateway, and for each kind of access a line with all tunnels that have it."""
    gateway = state.gateway
    if gateway.url is not None and gateway.access in _GATEWAY_SENTENCES:
        addresses = [gateway.url]
        if gateway.socket is not None and gateway.url.startswith("http"):  # it listens on both
            addresses.append(f"unix:{gateway.socket}")
        yield f"gateway {clean_line(' and '.join(addresses))}: {_GATEWAY_SENTENCES[gateway.access]}"
    for access, sentence in _TUNNEL_SENTENCES.items():
        local_ends = [_local_end(node) for node in state.nodes if node.tunnel.local_access is access]
        if local_ends:
            yield f"tunnel{'s' if len(local_ends) > 1 else ''} {', '.join(local_ends)}: {sentence}"


def _local_end(node: NodeState) -> str:
    """The node's name, and the address on this machine where its tunnel begins."""
    tunnel = node.tunnel
    address = f"unix:{tunnel.local_socket}" if tunnel.local_port is None else f"127.0.0.1:{tunnel.local_port}"
    return clean_line(f"{node.name} at {address}")
