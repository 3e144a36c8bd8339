"""Logs the connections of other users of this machine that a tunnel has reset."""

from __future__ import annotations

import logging

from gpumesh.tunnels.workers.protocol import PeerRefused

log = logging.getLogger(__name__)


def log_refused_user(node: str, refused: PeerRefused) -> None:
    """Logs a warning about the user whose connection was reset. A worker reports each user at most once a minute
    (local_system/peer_users.py)."""
    user = f"uid {refused.uid}" if refused.name is None else f"{refused.name} (uid {refused.uid})"
    log.warning(
        "user %s tried to connect to port %d, the local end of %s's tunnel, and was reset: it is for your own user"
        " and root; `tunnels: {share: true}` in mesh.yaml opens it to all users of this machine",
        user,
        refused.port,
        node,
        extra={"event": "local-user-refused", "node": node},
    )
