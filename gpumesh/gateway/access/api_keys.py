"""``ApiKeys``: the keys with which clients may use the gateway, and the check of the key that a client sends.

The gateway keeps only the SHA-256 of each key, and looks a client's key up by its SHA-256. The time that this look-up
takes tells nothing about the keys: nobody can choose a text whose hash comes closer to the hash of a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from gpumesh.errors import UsageError
from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.topology import GatewaySpec, KeySpec


class ApiKeys:
    """All keys of a gateway. ``keys`` has each key by the SHA-256 of its secret."""

    def __init__(self, keys: Mapping[bytes, ClientKey]) -> None:
        self._keys = dict(keys)

    def __repr__(self) -> str:
        return f"<ApiKeys {', '.join(key.label for key in self._keys.values())}>"

    @property
    def names(self) -> frozenset[str]:
        """The names of all holders of keys. A key that is given by ``api_key_env`` has no holder's name."""
        return frozenset(key.name for key in self._keys.values() if key.name is not None)

    def find(self, headers: Mapping[str, str]) -> ClientKey | None:
        """The key in ``Authorization`` or ``x-api-key``; ``None`` if neither holds a key of this gateway. Some clients
        send both headers, with our key in only one of them. If both hold our keys, ``Authorization`` counts."""
        for text in sent_keys(headers):
            # "surrogateescape" gives the bytes that the client sent: the parser has decoded the header in that way.
            key = self._keys.get(hash_key(text.encode("utf-8", "surrogateescape")))
            if key is not None:
                return key
        return None


def sent_keys(headers: Mapping[str, str]) -> list[str]:
    """The keys that a client sends, whether they are valid or not: at most two, that of ``Authorization`` first."""
    keys = []
    authorization = headers.get("authorization")
    if authorization is not None:
        scheme, _, credentials = authorization.partition(" ")
        if scheme.lower() == "bearer":
            keys.append(credentials.strip())
    x_api_key = headers.get("x-api-key")
    if x_api_key is not None:
        keys.append(x_api_key)
    return keys


def hash_key(key: bytes) -> bytes:
    """The SHA-256 of a key, under which ``ApiKeys`` stores it."""
    return hashlib.sha256(key).digest()


def read_api_keys(
    spec: GatewaySpec,
    *,
    read_secret: Callable[[str], str],
    read_secret_file: Callable[[Path], str],
    identity: Callable[[str], str],
) -> ApiKeys | None:
    """The keys of a gateway; ``None`` if it needs none. ``read_secret`` returns the secret in the variable of this
    name, ``read_secret_file`` that in this file. ``identity`` returns the text by which all names of one model are
    recognised (``ModelRules.identity``).

    Raises the errors of both functions, and UsageError if two keys have the same secret."""
    if not spec.needs_key:
        return None
    keys: dict[bytes, ClientKey] = {}

    def add(digest: bytes, key: ClientKey) -> None:
        """Adds a key. Raises UsageError for a secret that another key has."""
        if digest in keys:
            raise UsageError(
                f"the keys {keys[digest].label} and {key.label} of mesh.yaml have the same secret",
                hint="give each holder a key of its own",
            )
        keys[digest] = key

    if spec.api_key_env is not None:
        add(hash_key(read_secret(spec.api_key_env).encode()), ClientKey(label=spec.api_key_env))

    def read_digest(key: KeySpec) -> bytes:
        """The SHA-256 of the key's secret, wherever mesh.yaml has it."""
        if key.env is not None:
            return hash_key(read_secret(key.env).encode())
        if key.file is not None:
            return hash_key(read_secret_file(key.file).encode())
        assert key.sha256 is not None, "mesh.yaml gives one of env, file and hash"
        return bytes.fromhex(key.sha256)

    for key in spec.keys:
        add(read_digest(key), _make_client_key(key, identity))
    return ApiKeys(keys)


def find_key_by_name(spec: GatewaySpec, usage_name: str, identity: Callable[[str], str]) -> ClientKey | None:
    """The key of mesh.yaml with this ``ClientKey.usage_name``, for a request that the gateway itself sends for its
    holder; ``None`` if mesh.yaml has no such key any more. ``identity``: see ``read_api_keys``."""
    if spec.api_key_env is not None:
        shared_key = ClientKey(label=spec.api_key_env)
        if shared_key.usage_name == usage_name:
            return shared_key
    return next((_make_client_key(key, identity) for key in spec.keys if key.name == usage_name), None)


def _make_client_key(key: KeySpec, identity: Callable[[str], str]) -> ClientKey:
    """The key of one holder. ``identity``: see ``read_api_keys``."""
    models = None if key.models is None else frozenset(map(identity, key.models))
    nodes = _as_set(key.nodes)
    return ClientKey(key.name, key.name, key.priority, nodes, models, key.rate, key.tokens_per_month)


def _as_set(names: Iterable[str] | None) -> frozenset[str] | None:
    return None if names is None else frozenset(names)
