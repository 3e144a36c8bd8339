"""Listening Unix sockets of ours (mode 0600): made, taken over from a mesh that was killed, removed; and their URLs.

What already has the path is replaced only if it is a socket at which nobody listens any more. A file, a folder, a link
and the socket of whoever is alive stay as they are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from gpumesh.config import environment
from gpumesh.config.locate import SOCKET_PATH_LIMIT
from gpumesh.errors import GPUMeshError

SUFFIX = ".sock"
NAMES_TRIED = 100  # meshes of one user that run at once and have the same names


class PathInUse(GPUMeshError):
    """Somebody listens at that path, or something is there that is no socket."""


class UnixListener:
    """``sock`` listens at ``path`` until ``close``, which removes the path, if it is still ours."""

    def __init__(self, path: Path, backlog: int) -> None:
        """Raises PathInUse, GPUMeshError for a path that is too long, and OSError."""
        check_path_length(path)
        self.path = path
        with _one_at_a_time():
            _make_room(path)
            self.sock = _listen(path, backlog)
        found = path.lstat()
        self._identity: tuple[int, int] | None = (found.st_dev, found.st_ino)

    def remove_path(self) -> None:
        """The path, which lets no new client come. May be called twice."""
        identity, self._identity = self._identity, None
        with contextlib.suppress(OSError):
            found = self.path.lstat()
            if identity == (found.st_dev, found.st_ino):
                self.path.unlink()

    def close(self) -> None:
        """May be called twice."""
        self.remove_path()
        self.sock.close()


def check_path_length(path: Path) -> None:
    """Raises GPUMeshError."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_LIMIT:
        raise GPUMeshError(
            f"a Unix socket's path may have {SOCKET_PATH_LIMIT} bytes, this one has {length}: {path}",
            hint="choose a shorter one",
        )


def open_tunnel_listener(mesh: str, node: str, number: int, backlog: int) -> UnixListener:
    """The local end number ``number`` (from 0) of a node's tunnel, in the runtime folder (0700). Its name is the same
    each time, unless another mesh of this user that has the same names runs now. Raises GPUMeshError and OSError."""
    folder = environment.runtime_dir()
    stem = f"{mesh}-{node}" if number == 0 else f"{mesh}-{node}-{number + 1}"
    for take in range(1, NAMES_TRIED + 1):
        try:
            return UnixListener(folder / _name(stem, "" if take == 1 else f".{take}", folder), backlog)
        except PathInUse as error:
            last = error
    raise last


def _name(stem: str, take: str, folder: Path) -> str:
    """A file name that leaves the path short enough. Raises GPUMeshError where even a short one does not fit."""
    room = SOCKET_PATH_LIMIT - len(os.fsencode(folder)) - len("/") - len(f".{NAMES_TRIED}") - len(SUFFIX)
    clean = re.sub(r"[^A-Za-z0-9._-]", "_", stem)
    if len(clean) > room or clean != stem:
        mark = hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        if room < len(mark):
            raise GPUMeshError(
                f"the runtime folder's path is too long for a Unix socket in it: {folder}",
                hint="set XDG_RUNTIME_DIR to a folder with a shorter path, or use `tunnels: {listen: tcp}`",
            )
        clean = f"{clean[: max(room - len(mark) - 1, 0)]}-{mark}"[-room:]
    return clean + take + SUFFIX


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Of this user's processes: two that find the same stale socket must not remove each other's new one."""
    folder = os.open(environment.runtime_dir(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _make_room(path: Path) -> None:
    """Removes a socket at which nobody listens. Raises PathInUse and OSError."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise PathInUse(f"{path} is there already, and is no socket", hint="choose another path, or remove it yourself")
    if found.st_uid != os.geteuid():
        raise PathInUse(f"{path} is a socket of another user", hint="choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        answer = asking.connect_ex(os.fsencode(path))
    if answer == errno.ENOENT:
        return
    if answer != errno.ECONNREFUSED:  # 0: somebody listens; EAGAIN: the queue before somebody is full
        raise PathInUse(f"another program listens at {path}", hint="stop it, or choose another path")
    path.unlink(missing_ok=True)


def _listen(path: Path, backlog: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound = False
    try:
        # Linux gives the path the mode that the socket has before; elsewhere nobody can connect before `listen`.
        with contextlib.suppress(OSError):
            os.fchmod(sock.fileno(), 0o600)
        sock.bind(os.fsencode(path))
        bound = True
        if stat.S_IMODE(path.lstat().st_mode) != 0o600:
            path.chmod(0o600)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError:
        if bound:
            path.unlink(missing_ok=True)
        sock.close()
        raise
    return sock


# -- URLs --------------------------------------------------------------------------------------------------------------


def unix_url(path: Path, *, scheme: str = "http", prefix: str = "") -> str:
    """A base URL, in nginx's form: ``http://unix:/run/x.sock:/prefix``. It ends with a colon or the prefix, so that a
    request's path can be put after it."""
    return f"{scheme}://unix:{quote(str(path), safe='/')}:{prefix}"


def split_unix_url(url: str) -> tuple[str, str] | None:
    """The socket's path in a URL of that form, and what comes after it (``/api/tags``); ``None`` for any other URL."""
    _scheme, _, rest = url.partition("://")
    if not rest.startswith("unix:/"):
        return None
    path, colon, after = rest.removeprefix("unix:").partition(":")
    return (unquote(path), after) if colon else None
