"""Jump hosts as mesh.yaml and ssh_config write them. Pure."""

from __future__ import annotations


def parse_jump(jump: str, default_user: str) -> tuple[str, str, int]:
    """``[user@]host[:port]`` as (user, host, port). Raises ``ValueError``."""
    user, _, rest = jump.rpartition("@")
    if rest.startswith("["):
        host, _, tail = rest[1:].partition("]")
        port = tail.removeprefix(":")
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    else:
        host, port = rest, ""
    if not host:
        raise ValueError(f"not a jump host: {jump!r}")
    return user or default_user, host, int(port) if port else 22
