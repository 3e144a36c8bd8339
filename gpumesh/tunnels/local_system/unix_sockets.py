"""Makes and removes our listening Unix sockets (mode 0600), and takes over the path of a mesh that was killed.

A socket at the path is replaced only if no process listens at it any more. A file, a folder, a link and the socket of a
living process stay unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import socket
import stat
from pathlib import Path

from gpumesh.config import environment
from gpumesh.config.listen_address import SOCKET_PATH_LIMIT
from gpumesh.errors import GPUMeshError
from gpumesh.files import file_lock

SUFFIX = ".sock"
NAMES_TRIED = 100  # one user can run this many meshes with the same names at once


class PathInUse(GPUMeshError):
    """A path cannot be used for a new socket: another process listens there, or there is a file that is no socket."""


class UnixListener:
    """A listening Unix socket. ``sock`` listens at ``path`` until ``close``, which also removes the path.

    A path at which another socket has replaced ours stays.
    """

    def __init__(self, path: Path, backlog: int) -> None:
        """Raises PathInUse, GPUMeshError for a path that is too long, and OSError."""
        check_path_length(path)
        self.path = path
        # The lock: two processes of this user that see the same stale socket must not remove each other's new socket.
        with file_lock.locked_folder(environment.runtime_dir()):
            _remove_stale_socket(path)
            self.sock = _listen(path, backlog)
        status = path.lstat()
        # Device and inode of our socket's file; ``None``: the path was removed.
        self._identity: tuple[int, int] | None = (status.st_dev, status.st_ino)

    def __repr__(self) -> str:
        return f"<UnixListener {self.path} {'closed' if self._identity is None else 'listening'}>"

    def remove_path(self) -> None:
        """Removes the path, so that no new client can connect. May be called twice.

        The path stays if another socket has replaced ours there.
        """
        identity, self._identity = self._identity, None
        with contextlib.suppress(OSError):  # the path is gone already
            status = self.path.lstat()
            if identity == (status.st_dev, status.st_ino):
                self.path.unlink()

    def close(self) -> None:
        """Removes the path and closes the socket. May be called twice."""
        self.remove_path()
        self.sock.close()


def check_path_length(path: Path) -> None:
    """Raises GPUMeshError for a path that is too long for a Unix socket."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_LIMIT:
        raise GPUMeshError(
            f"a Unix socket's path may have {SOCKET_PATH_LIMIT} bytes, this one has {length}: {path}",
            hint="choose a shorter one",
        )


def open_tunnel_listener(mesh: str, node: str, number: int, backlog: int) -> UnixListener:
    """Opens local end ``number`` (from 0) of a node's tunnel, in the runtime folder (0700).

    The file name is ``MESH-NODE.sock``; from the second local end on ``MESH-NODE-2.sock``. If another mesh of this user
    with the same names runs now, the name gets a number: ``MESH-NODE.2.sock``. Raises OSError, and GPUMeshError when no
    name is free or the path would be too long.
    """
    folder = environment.runtime_dir()
    stem = f"{mesh}-{node}" if number == 0 else f"{mesh}-{node}-{number + 1}"
    for attempt in range(1, NAMES_TRIED + 1):
        attempt_suffix = "" if attempt == 1 else f".{attempt}"
        try:
            return UnixListener(folder / _file_name(stem, attempt_suffix, folder), backlog)
        except PathInUse as error:  # the next name is tried
            last_error = error
    raise last_error


def _file_name(stem: str, attempt_suffix: str, folder: Path) -> str:
    """Makes a file name from ``stem``, without special characters and so short that the path in ``folder`` is allowed.

    A changed or cut stem gets a digest, so that different stems never get the same name. Raises GPUMeshError if not
    even the digest fits.
    """
    # The bytes that are left for the stem, also if the attempt has the longest suffix.
    room = SOCKET_PATH_LIMIT - len(os.fsencode(folder)) - len("/") - len(f".{NAMES_TRIED}") - len(SUFFIX)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", stem)
    if len(name) > room or name != stem:
        digest = hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        if room < len(digest):
            raise GPUMeshError(
                f"the runtime folder's path is too long for a Unix socket in it: {folder}",
                hint="set XDG_RUNTIME_DIR to a folder with a shorter path, or use `tunnels: {listen: tcp}`",
            )
        beginning = name[: max(room - len(digest) - 1, 0)]
        name = f"{beginning}-{digest}"[-room:]  # without the hyphen if only the digest fits
    return name + attempt_suffix + SUFFIX


def _remove_stale_socket(path: Path) -> None:
    """Removes our user's socket at ``path`` if no process listens at it. Raises PathInUse for anything else, and
    OSError."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise PathInUse(f"{path} is there already, and is no socket", hint="choose another path, or remove it yourself")
    if status.st_uid != os.geteuid():
        raise PathInUse(f"{path} is a socket of another user", hint="choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(os.fsencode(path))
    if result == errno.ENOENT:  # another process has removed it meanwhile
        return
    if result != errno.ECONNREFUSED:  # 0: a process listens; EAGAIN: a process listens, and its queue is full
        raise PathInUse(f"another program listens at {path}", hint="stop it, or choose another path")
    path.unlink(missing_ok=True)


def _listen(path: Path, backlog: int) -> socket.socket:
    """Makes a non-blocking socket (mode 0600) that listens at ``path``. Raises OSError, and then leaves no file."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound = False
    try:
        # Linux gives the path the mode of the unbound socket. Other systems may refuse this. There no client can
        # connect before ``listen``, so the later ``chmod`` is early enough.
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
