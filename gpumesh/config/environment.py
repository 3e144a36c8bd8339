"""Reads the environment: facts about the user and the machine, and our folders. ``credentials`` reads the secrets.

Our folders are made here, private to the user: their sockets (control socket, ControlMaster) give access to the user's
hosts.
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
    """A copy of all variables, for ``${VAR}`` in mesh.yaml. LOGNAME is included even if the system did not set it."""
    return {"LOGNAME": user(), **os.environ}


def child_environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The environment for a program that we start: ours without the secrets that mesh.yaml names, and with ``changes``
    (``None`` removes a variable).

    The environment of a process can be read in /proc by all processes of the same user. It appears in crash reports and
    is inherited by the process's own children. No program that we start needs our secrets from it.
    """
    allowed = {name: value for name, value in os.environ.items() if name not in credentials.withheld_variables()}
    inherited: dict[str, str | None] = {**allowed, **(changes or {})}
    return {name: value for name, value in inherited.items() if value is not None}


def no_color() -> bool:
    """Whether NO_COLOR is set and not empty (https://no-color.org)."""
    return get("NO_COLOR") is not None


def force_color() -> bool:
    """Whether colours are wanted even where the output is no terminal."""
    return get("FORCE_COLOR") is not None or get("CLICOLOR_FORCE") not in (None, "0")


def is_ci() -> bool:
    """Whether a build service runs us, so that nobody can answer a question."""
    return (get("CI") or "").lower() not in ("", "0", "false")


def dumb_terminal() -> bool:
    return get("TERM") in (None, "dumb")


def shell() -> str | None:
    """The file name of the user's shell (``bash``, ``fish``), or ``None``."""
    path = get("SHELL")
    return Path(path).name if path else None


def ssh_auth_sock() -> Path | None:
    """The socket of the SSH agent, if the environment names one."""
    path = get("SSH_AUTH_SOCK")
    return Path(path) if path else None


def display() -> str | None:
    """The graphical display of the user's session; ``None`` where no window can be opened."""
    return get("WAYLAND_DISPLAY") or get("DISPLAY")


def user() -> str:
    """The name of our user, which ssh would use for the remote user; ``root`` if the system does not tell."""
    name = get("LOGNAME") or get("USER") or get("USERNAME")
    if name:
        return name
    if sys.platform == "win32":
        return "root"
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's arbitrary uid
        return "root"


def home() -> Path:
    """The user's home folder. Raises GPUMeshError if there is none (a service without HOME and without an entry in
    passwd)."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise GPUMeshError("cannot tell your home folder", hint="set HOME") from error


def config_dir() -> Path:
    """The folder for our configuration on this platform. It may not exist."""
    if sys.platform == "win32":
        return Path(get("APPDATA") or home() / "AppData" / "Roaming") / _APP
    if (xdg_folder := _absolute_path("XDG_CONFIG_HOME")) is not None:
        return xdg_folder / _APP
    if sys.platform == "darwin" and not (home() / ".config" / _APP).is_dir():
        return home() / "Library" / "Application Support" / _APP
    return home() / ".config" / _APP


def runtime_dir() -> Path:
    """The folder for sockets and locks, made private (0700). The system empties it at logout or restart.

    It is ``$XDG_RUNTIME_DIR/gpumesh``, else ``/tmp/gpumesh-UID``: both are short, since a Unix socket's path may not be
    long.
    Raises GPUMeshError when another user could access the folder.
    """
    if sys.platform == "win32":
        return _make_private(Path(get("LOCALAPPDATA") or home() / "AppData" / "Local") / _APP / "run")
    base = _absolute_path("XDG_RUNTIME_DIR")
    # After `su` or `sudo` the variable may still be another user's.
    if base is not None and _is_ours(base):
        return _make_private(base / _APP)
    return _make_private(Path("/tmp") / f"{_APP}-{os.geteuid()}")  # noqa: S108 - checked by _make_private


def runtime_dirs() -> tuple[Path, ...]:
    """The existing, private folders that ``runtime_dir`` may have returned for this user. There can be two: a service
    or a cron job has no XDG_RUNTIME_DIR, while the same user's shell has."""
    if sys.platform == "win32":
        return ()
    base = _absolute_path("XDG_RUNTIME_DIR") or Path(f"/run/user/{os.geteuid()}")
    candidates = (base / _APP, Path("/tmp") / f"{_APP}-{os.geteuid()}")  # noqa: S108 - checked below
    folders = []
    for folder in candidates:
        with contextlib.suppress(OSError):
            if _privacy_problem(folder.lstat()) is None:
                folders.append(folder)
    return tuple(folders)


def state_dir() -> Path:
    """The folder for files that outlive a run (logs, measured results), made private (0700).

    It is below the runtime folder if the user's home cannot be written to (in a container, for a service).
    """
    if sys.platform == "win32":
        return _make_private(Path(get("LOCALAPPDATA") or home() / "AppData" / "Local") / _APP)
    if (xdg_folder := _absolute_path("XDG_STATE_HOME")) is not None:
        return _make_private(xdg_folder / _APP)
    if sys.platform == "darwin":
        return _make_private(home() / "Library" / "Application Support" / _APP)
    try:
        return _make_private(home() / ".local" / "state" / _APP)
    except GPUMeshError:
        return _make_private(runtime_dir() / "state")


def _absolute_path(variable: str) -> Path | None:
    """The path in a variable, or ``None`` if it is relative: the XDG specification requires to ignore such a path."""
    path = get(variable)
    return Path(path) if path and os.path.isabs(path) else None


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder that belongs to our user and in which we can make files."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and os.access(folder, os.W_OK | os.X_OK)


def _make_private(folder: Path) -> Path:
    """Makes ``folder`` if it is missing, and returns it. Closes it to other users if it was made more open.

    Raises GPUMeshError if it is not a real folder of ours, or if others may write to it: in a shared folder such as
    /tmp another user may have made a link or a folder of that name first.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if sys.platform == "win32":
            return folder
        problem = _privacy_problem(status)
        if problem is None and stat.S_IMODE(status.st_mode) & 0o077:
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


def _privacy_problem(status: os.stat_result) -> str | None:
    """The reason why a folder cannot be private, as the end of a sentence that begins with the folder's path."""
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a folder"
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if stat.S_IMODE(status.st_mode) & 0o022:
        return "may be written to by other users"
    return None
