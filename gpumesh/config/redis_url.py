"""Reads the URL of a Redis in mesh.yaml: one server, a Unix socket, or a service that Sentinels watch. Pure."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from gpumesh.config.value_parsers import SensitiveError

_EXAMPLE = "redis://localhost:6379/0, unix:///path/to/socket or redis+sentinel://one:26379,two:26379/SERVICE/0"
_SERVER_SCHEMES = ("redis", "rediss")
_SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel")
TLS_SCHEMES = ("rediss", "rediss+sentinel")
_DATABASE = r"\d{1,4}"
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)"
_SENTINEL = re.compile(rf"{_HOST}(?::(\d{{1,5}}))?")
_SERVICE_PATH = re.compile(rf"/[A-Za-z0-9._-]+(?:/{_DATABASE})?/?")


def parse_redis_url(text: str) -> str:
    """Returns ``text`` if it is a URL of Redis without a password. Raises ValueError for any other text, and
    SensitiveError if it may hold a password."""
    scheme, separator, rest = text.partition("://")
    if scheme not in (*_SERVER_SCHEMES, *_SENTINEL_SCHEMES, "unix") or not separator or not text.isprintable():
        raise ValueError(f"is not Redis's URL: write it like {_EXAMPLE}")
    user = rest.partition("/")[0].rpartition("@")[0]
    if ":" in user:
        raise SensitiveError("holds a password: name its variable in redis.password_env")
    # redis-py takes any of its settings from there, ``password`` and the check of certificates too.
    query = rest.partition("?")[2]
    if query and not (scheme == "unix" and re.fullmatch(rf"db={_DATABASE}", query)):
        raise SensitiveError("has settings after a question mark: only unix:///path/to/socket?db=1 may have one")
    try:
        if scheme in _SENTINEL_SCHEMES:
            _check_sentinels(rest)
        else:
            _check_server(text)
    except ValueError as error:
        raise ValueError(f"is not Redis's URL: {error}; write it like {_EXAMPLE}") from None
    return text


def redis_hosts(url: str) -> tuple[str, ...]:
    """The hosts of a URL that ``parse_redis_url`` takes: a server, or Sentinels; none for a socket."""
    scheme, _, rest = url.partition("://")
    authority = rest.partition("/")[0].rpartition("@")[2]
    if scheme == "unix":
        return ()
    hosts = [host if host.endswith("]") else host.rpartition(":")[0] or host for host in authority.split(",")]
    return tuple(host.strip("[]") for host in hosts)


def _check_server(url: str) -> None:
    """Raises ValueError, with a message, if this is no URL of a server or of a socket."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        raise ValueError("the port or the address in it cannot be read") from None
    if parts.fragment:
        raise ValueError("it has a fragment")
    if parts.scheme == "unix":
        if parts.netloc.rpartition("@")[2] or not parts.path.strip("/"):
            raise ValueError("a socket has a path and no host")
        return
    if not re.fullmatch(_HOST, parts.netloc.rpartition("@")[2].removesuffix(f":{port}")) or port == 0:
        raise ValueError("it has no host, or a port that no server has")
    if not re.fullmatch(rf"/?|/{_DATABASE}", parts.path):
        raise ValueError("its path is the number of a database")


def _check_sentinels(rest: str) -> None:
    """Raises ValueError, with a message, if what comes after ``://`` does not name Sentinels and a service."""
    authority, slash, path = rest.partition("/")
    hosts = authority.rpartition("@")[2].split(",")
    matches = [_SENTINEL.fullmatch(host) for host in hosts]
    if not all(match is not None and 0 < int(match[1] or 1) < 1 << 16 for match in matches):
        raise ValueError("a Sentinel cannot be read")
    if not _SERVICE_PATH.fullmatch(slash + path):
        raise ValueError("the name of the service is missing, or cannot be read")
