"""Parses the addresses at which the gateway listens (``HOST:PORT``, ``unix:PATH``); refuses open ones without API key.

An address is open if other machines can reach it. This module does not import yaml, so that quick commands stay
quick.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import NamedTuple

from gpumesh.errors import UsageError
from gpumesh.text.addresses import is_loopback

DEFAULT_HOST = "127.0.0.1"
UNIX_PREFIX = "unix:"
# sun_path holds 108 bytes on Linux and 104 on macOS and the BSDs, its closing NUL included.
SOCKET_PATH_LIMIT = 103  # bytes, without the NUL

OPEN_LISTEN_MESSAGE = "lets other machines use your GPUs, and no API key is asked for"
OPEN_LISTEN_HINT = "name the variable that holds the key in gateway.api_key_env, or listen on 127.0.0.1"

_HOST_PORT = re.compile(r"(?:(?P<host>\[[^\]]*\]|[^:\[\]]*):)?(?P<port>\d{1,6})")


class ListenAddresses(NamedTuple):
    """The addresses at which the gateway listens: ``host`` and ``port``, the Unix socket at ``socket``, or both.

    With the socket alone, ``host`` is ``None`` and ``port`` is 0.
    """

    host: str | None
    port: int
    socket: Path | None


def parse_listen_option(text: str, *, has_key: bool) -> ListenAddresses:
    """Parses ``HOST:PORT``, ``PORT``, ``unix:PATH``, or an address and ``unix:PATH`` with a comma between them. Raises
    UsageError as ``parse_listen_address`` does."""
    address, separator, path = text.partition(f",{UNIX_PREFIX}")
    if not separator:  # HOST:PORT alone, or unix:PATH alone
        if not text.startswith(UNIX_PREFIX):
            host, port = parse_listen_address(text, has_key=has_key)
            return ListenAddresses(host, port, socket=None)
        address, path = "", text.removeprefix(UNIX_PREFIX)
    try:
        socket = Path(check_socket_path(path)).expanduser().absolute()
    except (ValueError, RuntimeError) as error:  # RuntimeError: there is no home folder for ``~``
        raise UsageError(f"{text[:80]!r} {error}") from error
    if not address:
        return ListenAddresses(None, 0, socket)
    host, port = parse_listen_address(address, has_key=has_key)
    return ListenAddresses(host, port, socket)


def parse_listen_entry(text: str) -> tuple[str, int] | str:
    """Parses an address of ``gateway.listen``. Returns the host and the port, or the path of a Unix socket.

    Raises ValueError as ``split_host_port`` does.
    """
    if text.startswith(UNIX_PREFIX):
        return check_socket_path(text.removeprefix(UNIX_PREFIX))
    return split_host_port(text)


def check_socket_path(text: str) -> str:
    """Returns ``text`` if it can be the path of a Unix socket. Raises ValueError whose text completes a sentence that
    begins with the value."""
    if not text or not text.isprintable() or text.endswith("/"):
        raise ValueError("names no socket: write unix:PATH, such as unix:/run/user/1000/gpumesh.sock")
    if text.startswith("~") and not text.startswith("~/"):
        raise ValueError("names another user's home: write the whole path")
    if len(os.fsencode(text)) > SOCKET_PATH_LIMIT:
        raise ValueError(f"is longer than the {SOCKET_PATH_LIMIT} bytes that a Unix socket's path may have")
    return text


def parse_listen_address(text: str, *, has_key: bool) -> tuple[str, int]:
    """Parses ``HOST:PORT`` or ``PORT`` for the gateway. Returns the host and the port.

    Raises UsageError when the text is neither, or when other machines could connect and no API key is required.
    """
    try:
        host, port = split_host_port(text)
    except ValueError as error:
        raise UsageError(f"{text[:80]!r} {error}") from error
    require_key_beyond_loopback(host, has_key=has_key)
    return host, port


def require_key_beyond_loopback(host: str, *, has_key: bool) -> None:
    """Raises UsageError if other machines can reach ``host`` and clients need not send an API key."""
    if not has_key and not is_loopback(host):
        raise UsageError(f"listening on {host} {OPEN_LISTEN_MESSAGE}", hint=OPEN_LISTEN_HINT)


def split_host_port(text: str) -> tuple[str, int]:
    """Splits ``HOST:PORT`` or ``PORT`` into the host and the port. Brackets around an IPv6 address are removed.

    ``PORT`` alone gives ``DEFAULT_HOST``. Raises ValueError whose text completes a sentence that begins with the value.
    """
    match = _HOST_PORT.fullmatch(text.strip())
    if match is None:
        raise ValueError("is not HOST:PORT, such as 127.0.0.1:11430 or [::1]:11430, nor unix:PATH")
    port = int(match["port"])
    if port > 65535:
        raise ValueError(f"has port {port}, which is not between 0 and 65535")
    host = match["host"]
    if host is None:
        return DEFAULT_HOST, port
    if host == "":
        raise ValueError(f"does not say on which address: write 127.0.0.1:{port}, or 0.0.0.0:{port} for all")
    if host.startswith("["):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError("has no IPv6 address between [ and ]") from None
    elif not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}", host):
        raise ValueError("has a host that is neither a name nor an address")
    return host, port
