"""Reads the URLs of Redis (also of a Redis behind Sentinel), and says where its server is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

from redis.asyncio.connection import Connection, SSLConnection, parse_url
from redis.exceptions import ResponseError

from gpumesh.errors import UsageError

ReadPassword = Callable[[], str | None]
"""Called at each connect; its result is not stored."""

DEFAULT_SENTINEL_PORT = 26379
_MOVED = re.compile(r"(?:MOVED )?\d+ (?P<host>\S*):(?P<port>\d+)")


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where a Redis is, without its password.

    ``connection_class`` and ``options`` are those of redis-py. If there are ``sentinels`` (host, port), they are asked
    where the master of ``service`` is; they have the same TLS. ``read_sentinel_password`` returns their password;
    ``None``: they need none."""

    connection_class: type
    options: Mapping[str, object]
    sentinels: tuple[tuple[str, int], ...] = ()
    service: str = ""
    read_sentinel_password: ReadPassword = lambda: None

    def at(self, host: str, port: int) -> RedisAddress:
        """The same Redis at another server."""
        return replace(self, options={**self.options, "host": host, "port": port}, sentinels=())

    def sentinel_address(self, host: str, port: int) -> RedisAddress:
        """One of the sentinels as a server."""
        options = {name: value for name, value in self.options.items() if name not in ("db", "username")}
        return replace(self, options={**options, "host": host, "port": port}, sentinels=())


def read_address(
    url: str, *, ca_file: str | None = None, read_sentinel_password: ReadPassword = lambda: None
) -> RedisAddress:
    """Reads ``redis://``, ``rediss://`` (TLS), ``unix://``, and ``redis+sentinel://h1:p,h2:p/service/db`` (with TLS:
    ``rediss+sentinel://``). Raises UsageError if it is none of them."""
    try:
        address = _read_sentinels(url) if "+sentinel:" in url else _read_server(url)
    except ValueError as error:
        raise UsageError(f"redis.url cannot be used: {error}") from None
    if ca_file is not None and address.connection_class is SSLConnection:
        address = replace(address, options={**address.options, "ssl_ca_certs": ca_file})
    return replace(address, read_sentinel_password=read_sentinel_password)


def _read_server(url: str) -> RedisAddress:
    options = dict(parse_url(url))
    connection_class = options.pop("connection_class", Connection)
    assert isinstance(connection_class, type)
    return RedisAddress(connection_class, options)


def _read_sentinels(url: str) -> RedisAddress:
    parts = urlsplit(url)
    user, _, servers = parts.netloc.rpartition("@")
    sentinels = []
    for server in servers.split(","):
        # urlsplit knows brackets around IPv6 addresses; a network location may hold a single server only.
        one = urlsplit(f"//{server}")
        if not one.hostname:
            raise ValueError(f"no sentinel is named in {servers!r}")
        sentinels.append((one.hostname, one.port or DEFAULT_SENTINEL_PORT))
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("the service is missing: write redis+sentinel://host:26379/service/0")
    options: dict[str, object] = {"db": int(db or 0)}
    if user:
        options["username"] = unquote(user.partition(":")[0])
    connection_class = SSLConnection if parts.scheme.startswith("rediss") else Connection
    return RedisAddress(connection_class, options, tuple(sentinels), unquote(service))


def moved_address(error: ResponseError, address: RedisAddress) -> RedisAddress | None:
    """Where a server of a Redis Cluster sends the client (``MOVED slot host:port``); ``None``: it is another error."""
    # redis-py has a class for this error in some versions, whose text lacks the first word.
    if not (str(error).startswith("MOVED ") or type(error).__name__ == "MovedError"):
        return None
    match = _MOVED.match(str(error))
    if match is None:
        return None
    # An empty host stands for the server that was asked.
    return address.at(match["host"].strip("[]") or str(address.options.get("host", "localhost")), int(match["port"]))
