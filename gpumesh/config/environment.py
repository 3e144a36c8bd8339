"""What the environment says about the person and the machine: the only reader of it besides ``credentials``.

Folders are made here, private to the user, because what stands in them (a control socket, ControlMaster sockets) lets
whoever can open it use the user's hosts.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from gpumesh.config import credentials
from gpumesh.errors import GPUMeshError
from gpumesh.quoting import paste_command

_APP = "gpumesh"


def get(name: str) -> str | None:
    """A variable's value; ``None`` when it is not set or empty. Not for secrets: see ``credentials``."""
    return os.environ.get(name) or None


def variables() -> dict[str, str]:
    """A copy of all, for ``${VAR}`` in mesh.yaml. The user's name is there even where the system forgot to set it."""
    return {"LOGNAME": user(), **os.environ}


def child_environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The environment for a program we start: ours without the secrets that mesh.yaml names, and with ``changes``
    (``None`` takes a variable away).

    What one user's process has in its environment stands in /proc for all others of the same user, in crash reports,
    and in whatever that process starts in turn. Nothing that we start needs our secrets from there.
    """
    kept = {name: value for name, value in os.environ.items() if name not in credentials.withheld_variables()}
    inherited: dict[str, str | None] = {**kept, **(changes or {})}
    return {name: value for name, value in inherited.items() if value is not None}


def no_color() -> bool:
    """https://no-color.org: set and not empty."""
    return get("NO_COLOR") is not None


def force_color() -> bool:
    return get("FORCE_COLOR") is not None or get("CLICOLOR_FORCE") not in (None, "0")


def is_ci() -> bool:
    """Whether a build service runs us: nobody is there to answer a question."""
    return (get("CI") or "").lower() not in ("", "0", "false")


def dumb_terminal() -> bool:
    return get("TERM") in (None, "dumb")


def shell() -> str | None:
    """The person's shell by its file name (``bash``, ``fish``), or ``None``."""
    named = get("SHELL")
    return Path(named).name if named else None


def ssh_auth_sock() -> Path | None:
    """Where the SSH agent listens, if one is told of."""
    named = get("SSH_AUTH_SOCK")
    return Path(named) if named else None


def display() -> str | None:
    return get("WAYLAND_DISPLAY") or get("DISPLAY")


def user() -> str:
    """Who runs us, as ssh would take it for the remote user; ``root`` where the system does not say."""
    named = get("LOGNAME") or get("USER") or get("USERNAME")
    if named:
        return named
    if sys.platform == "win32":
        return "root"
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's arbitrary uid
        return "root"


def home() -> Path:
    """Raises GPUMeshError where there is none (a service without HOME and without an entry in passwd)."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise GPUMeshError("cannot tell your home folder", hint="set HOME") from error


def config_dir() -> Path:
    """The platform's folder for our configuration; may not exist."""
    if sys.platform == "win32":
        return Path(get("APPDATA") or home() / "AppData" / "Roaming") / _APP
    if (named := _absolute("XDG_CONFIG_HOME")) is not None:
        return named / _APP
    if sys.platform == "darwin" and not (home() / ".config" / _APP).is_dir():
        return home() / "Library" / "Application Support" / _APP
    return home() / ".config" / _APP


def runtime_dir() -> Path:
    """The folder for sockets and locks, made private (0700). Emptied by the system at logout or restart.

    ``$XDG_RUNTIME_DIR/gpumesh``, else ``/tmp/gpumesh-UID``: short, since a Unix socket's path may not be long.
    Raises GPUMeshError when somebody else could get at it.
    """
    if sys.platform == "win32":
        return _make_private(Path(get("LOCALAPPDATA") or home() / "AppData" / "Local") / _APP / "run")
    base = _absolute("XDG_RUNTIME_DIR")
    # After `su` or `sudo` the variable may still be another user's.
    if base is not None and _is_ours(base):
        return _make_private(base / _APP)
    return _make_private(Path("/tmp") / f"{_APP}-{os.geteuid()}")  # noqa: S108 - checked by _make_private


def runtime_dirs() -> tuple[Path, ...]:
    """All that ``runtime_dir`` may have been for this user, as far as they are there and private: a service or a cron
    job has no XDG_RUNTIME_DIR, the same user's shell has."""
    if sys.platform == "win32":
        return ()
    base = _absolute("XDG_RUNTIME_DIR") or Path(f"/run/user/{os.geteuid()}")
    candidates = (base / _APP, Path("/tmp") / f"{_APP}-{os.geteuid()}")  # noqa: S108 - checked below
    found = []
    for folder in candidates:
        with contextlib.suppress(OSError):
            if _why_not_private(folder.lstat()) is None:
                found.append(folder)
    return tuple(found)


def state_dir() -> Path:
    """The folder for what outlives a run (logs, measured results), made private (0700).

    Below the runtime folder for a user without a home to write to (a container's, a service's).
    """
    if sys.platform == "win32":
        return _make_private(Path(get("LOCALAPPDATA") or home() / "AppData" / "Local") / _APP)
    if (named := _absolute("XDG_STATE_HOME")) is not None:
        return _make_private(named / _APP)
    if sys.platform == "darwin":
        return _make_private(home() / "Library" / "Application Support" / _APP)
    try:
        return _make_private(home() / ".local" / "state" / _APP)
    except GPUMeshError:
        return _make_private(runtime_dir() / "state")


def _absolute(name: str) -> Path | None:
    """The XDG specification: a relative path in these variables is to be ignored."""
    named = get(name)
    return Path(named) if named and os.path.isabs(named) else None


def _is_ours(folder: Path) -> bool:
    try:
        found = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and os.access(folder, os.W_OK | os.X_OK)


def _make_private(folder: Path) -> Path:
    """Makes ``folder`` if need be, and checks that it is a real folder of ours that nobody else may enter.

    In a shared place such as /tmp anybody can be there first: with a link to elsewhere, or with a folder of theirs.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if sys.platform == "win32":
            return folder
        problem = _why_not_private(found)
        if problem is None and stat.S_IMODE(found.st_mode) & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise GPUMeshError(
            f"cannot make the folder {folder}: {error.strerror or error}",
            hint="set XDG_RUNTIME_DIR and XDG_STATE_HOME to folders that you can write to",
        ) from error
    if problem is not None:
        raise GPUMeshError(
            f"{folder} {problem}, so gpumesh does not use it",
            hint=f"look at what it is ({paste_command('ls -ld {FOLDER}', FOLDER=str(folder))}) and remove it, or set"
            " XDG_RUNTIME_DIR to a folder of yours",
        )
    return folder


def _why_not_private(found: os.stat_result) -> str | None:
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    if stat.S_IMODE(found.st_mode) & 0o022:
        return "may be written to by other users"
    return None
