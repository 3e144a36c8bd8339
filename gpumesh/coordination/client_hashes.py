"""Hashes the names of clients, so that no name leaves this process."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b


@lru_cache(maxsize=4096)
def hash_client(mesh: str, client: str) -> str:
    """The hash that stands for a client among the gateways of this mesh. Other meshes have other hashes for it."""
    salt = blake2b(mesh.encode("utf-8", "surrogateescape"), digest_size=32).digest()
    return blake2b(client.encode("utf-8", "surrogateescape"), digest_size=8, key=salt).hexdigest()
