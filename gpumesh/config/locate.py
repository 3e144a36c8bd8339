"""Which file is meant, and which address: needs neither yaml nor pydantic, so that quick commands stay quick."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import NamedTuple

from gpumesh.addresses import is_loopback as is_loopback  # noqa: PLC0414 - part of this file's interface
from gpumesh.config import environment, untrusted_file
from gpumesh.errors import UsageError
from gpumesh.quoting import paste_command

FILE_NAME = "mesh.yaml"
DEFAULT_HOST = "127.0.0.1"
UNIX_PREFIX = "unix:"
# sun_path holds 108 bytes on Linux and 104 on macOS and the BSDs, its closing NUL included.
SOCKET_PATH_LIMIT = 103

_HOST_PORT = re.compile(r"(?:(?P<host>\[[^\]]*\]|[^:\[\]]*):)?(?P<port>\d{1,6})")


def find_config(explicit: Path | None = None) -> Path:
    """The mesh.yaml to use, resolved: ``explicit``, else ``$GPUMESH_CONFIG``, else ``./mesh.yaml``, else the
    platform's folder. Raises UsageError when there is none, when the one that was named is not a file, or when the one
    in the current folder may be somebody else's."""
    if explicit is not None:
        return _named(Path(explicit), "")
    variable = environment.get("GPUMESH_CONFIG")
    if variable is not None:
        return _named(Path(variable), " (named by $GPUMESH_CONFIG)")
    here = Path(FILE_NAME)
    platform = environment.config_dir() / FILE_NAME
    if _exists(here):
        found = _named(here, "")
        _refuse_strangers(here)
        return found
    if _exists(platform):
        return _named(platform, "")
    hint = "`gpumesh init` writes one, `gpumesh demo` needs none, `--config FILE` names one"
    if _exists(Path("mesh.yml")):
        hint = "there is a mesh.yml here: rename it to mesh.yaml, or name it with --config"
    raise UsageError(f"there is no {FILE_NAME}: neither here nor at {platform}", hint=hint)


def search_paths(explicit: Path | None = None) -> tuple[Path, ...]:
    """Where ``find_config`` looks, whether there is a file or not: first the one that it would take."""
    named = explicit or environment.get("GPUMESH_CONFIG")
    if named is not None:
        return (Path(named),)
    return Path(FILE_NAME), environment.config_dir() / FILE_NAME


class ListenAddresses(NamedTuple):
    """Where the gateway listens: ``host`` and ``port``, the Unix socket at ``socket``, or both."""

    host: str | None
    port: int
    socket: Path | None


def parse_listen_option(text: str, *, api_key_env: str | None) -> ListenAddresses:
    """``HOST:PORT``, ``PORT``, ``unix:PATH``, or an address and ``unix:PATH`` with a comma between them. Raises
    UsageError as ``parse_listen_address`` does."""
    address, comma, path = text.partition(f",{UNIX_PREFIX}")
    if not comma and text.startswith(UNIX_PREFIX):
        address, path = "", text.removeprefix(UNIX_PREFIX)
    elif not comma:
        return ListenAddresses(*parse_listen_address(text, api_key_env=api_key_env), None)
    try:
        socket = Path(socket_path(path)).expanduser().absolute()
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{text[:80]!r} {error}") from error
    if not address:
        return ListenAddresses(None, 0, socket)
    return ListenAddresses(*parse_listen_address(address, api_key_env=api_key_env), socket)


def parse_listen_entry(text: str) -> tuple[str, int] | str:
    """One address of ``gateway.listen``: host and port, or the path of a Unix socket. Raises ValueError as
    ``split_host_port`` does."""
    return socket_path(text.removeprefix(UNIX_PREFIX)) if text.startswith(UNIX_PREFIX) else split_host_port(text)


def socket_path(text: str) -> str:
    """Raises ValueError whose text completes a sentence that begins with the value."""
    if not text or not text.isprintable() or text.endswith("/"):
        raise ValueError("names no socket: write unix:PATH, such as unix:/run/user/1000/gpumesh.sock")
    if text.startswith("~") and not text.startswith("~/"):
        raise ValueError("names another user's home: write the whole path")
    if len(os.fsencode(text)) > SOCKET_PATH_LIMIT:
        raise ValueError(f"is longer than the {SOCKET_PATH_LIMIT} bytes that a Unix socket's path may have")
    return text


def parse_listen_address(text: str, *, api_key_env: str | None) -> tuple[str, int]:
    """``HOST:PORT`` or ``PORT`` for the gateway. Raises UsageError when it is not one, or when it would be open to
    other machines with no key to keep them out."""
    try:
        host, port = split_host_port(text)
    except ValueError as error:
        raise UsageError(f"{text[:80]!r} {error}") from error
    require_key_beyond_loopback(host, api_key_env=api_key_env)
    return host, port


def require_key_beyond_loopback(host: str, *, api_key_env: str | None) -> None:
    """Raises UsageError for an address that other machines can reach, with no key to keep them out."""
    if api_key_env is None and not is_loopback(host):
        raise UsageError(f"listening on {host} {OPEN_LISTEN_MESSAGE}", hint=OPEN_LISTEN_HINT)


OPEN_LISTEN_MESSAGE = "lets other machines use your GPUs, and no API key is asked for"
OPEN_LISTEN_HINT = "name the variable that holds the key in gateway.api_key_env, or listen on 127.0.0.1"


def split_host_port(text: str) -> tuple[str, int]:
    """Raises ValueError whose text completes a sentence that begins with the value."""
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


def display_path(path: Path) -> str:
    """A path as a person would name it: relative when it lies below the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def _exists(path: Path) -> bool:
    """Whether something has that name: a link that leads nowhere must be told of, not passed over."""
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL in the name
        return False


def _refuse_strangers(here: Path) -> None:
    """Raises UsageError for a file that nobody named and that another user may have written."""
    try:
        reason = untrusted_file.untrusted_reason(here)
    except OSError as error:
        raise UsageError(f"cannot use {here}: {error.strerror}") from error
    if reason is not None:
        raise UsageError(
            f"the {here} in this folder {reason}, so it is not used without being named",
            hint="look at what it does, and if you want that, name it: "
            + paste_command("gpumesh --config {FILE} …", FILE=f"./{here}"),
        )


def _named(path: Path, whence: str) -> Path:
    name = (str(path) if str(path).isprintable() else repr(str(path))) + whence
    try:
        if path.is_dir():
            inner = path / FILE_NAME
            hint = f"did you mean {display_path(inner)}?" if inner.is_file() else f"name the {FILE_NAME} itself"
            raise UsageError(f"{name} is a folder, not a {FILE_NAME}", hint=hint)
        if not path.exists():
            hint = "it is a link that leads nowhere" if path.is_symlink() else "`gpumesh init` writes one"
            raise UsageError(f"{name} does not exist", hint=hint)
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, links in a circle
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"cannot use {name}: {reason}") from error
