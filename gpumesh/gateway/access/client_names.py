"""``ClientNames`` names the client that sends a request, so that the queue can give each client its share.

Only the name of a key's holder is proven. Clients without such a key are trusted to name themselves.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from hashlib import blake2b

from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.text.printable import printable

MAX_NAME_CHARS = 64


class ClientNames:
    """The names of clients. ``key_names``: the holders of keys, whose names nobody else may use.

    A credential in a name is hashed with a secret that is new for each process. So nobody who reads the name can find
    the credential by trying: without the secret, no guess can be tested.
    """

    def __init__(self, key_names: Collection[str] = ()) -> None:
        self.key_names = frozenset(key_names)
        self._secret = secrets.token_bytes(16)

    def name_client(self, key: ClientKey | None, headers: Mapping[str, str], address: str | None) -> str:
        """The name of the client that sends a request with this key, from this address. It is the first of these:

        - the name of the key's holder;
        - the header ``X-GPUMesh-Client``, if it is no holder's name;
        - a hash of the credential that the client sends, and of its address. Many clients of a gateway without keys
          send the same word as their key ("ollama"), so the credential alone would make them one client;
        - the address; empty if it is not known.
        """
        if key is not None and key.name is not None:
            return key.name
        header = headers.get("x-gpumesh-client")
        if header is not None:
            name = printable(header, MAX_NAME_CHARS)
            if name and name not in self.key_names:
                return name
        credential = headers.get("authorization") or headers.get("x-api-key")
        if credential:
            text = f"{credential}\0{address}".encode("utf-8", "surrogateescape")
            return f"credential-{blake2b(text, key=self._secret, digest_size=6).hexdigest()}"
        return address or ""
