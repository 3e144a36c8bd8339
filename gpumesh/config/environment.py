"""Reads environment variables: the user, the terminal, colours; gpumesh's folders for configuration, sockets and logs.

The folders for sockets and logs are made private to the user: the sockets (control socket, ControlMaster) give access
to the user's hosts. ``credentials`` reads the secrets.
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
from gpumesh.text.quoting import paste_command

_APP = "gpumesh"  # the name of each of our folders


def get(name: str) -> str | None:
    """Returns the variable's value; ``None`` when the variable is empty or not set. Not for secrets: see
    ``credentials``."""
    return os.environ.get(name) or None


def variables() -> dict[str, str]:
    """Returns a copy of all variables, for ``${VAR}`` in mesh.yaml. LOGNAME is included even if it is not set."""
    return {"LOGNAME": user(), **os.environ}


def child_environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Returns the environment for a program that we start: ours without the secrets that mesh.yaml names.

    No such program needs our secrets, and an environment is no safe place for them: all processes of the same user can
    read it in /proc, crash reports show it, and the program's own children inherit it.

    ``changes`` has new values of variables; ``None`` removes a variable.
    """
    withheld = credentials.withheld_variables()
    child_variables = {name: value for name, value in os.environ.items() if name not in withheld}
    for name, value in (changes or {}).items():
        if value is None:
            child_variables.pop(name, None)
        else:
            child_variables[name] = value
    return child_variables


def no_color() -> bool:
    """Whether NO_COLOR is set and not empty (https://no-color.org)."""
    return get("NO_COLOR") is not None


def force_color() -> bool:
    """Whether colours are wanted even if the output is no terminal: FORCE_COLOR, or CLICOLOR_FORCE other than ``0``."""
    return get("FORCE_COLOR") is not None or get("CLICOLOR_FORCE") not in (None, "0")


def is_ci() -> bool:
    """Whether a build service runs us, so that nobody can answer a question."""
    return (get("CI") or "").lower() not in ("", "0", "false")


def dumb_terminal() -> bool:
    """Whether the terminal understands no escape sequences: TERM is ``dumb`` or not set."""
    return get("TERM") in (None, "dumb")


def shell() -> str | None:
    """The file name of the user's shell (``bash``, ``fish``); ``None`` when SHELL is not set."""
    path = get("SHELL")
    return Path(path).name if path else None


def ssh_auth_sock() -> Path | None:
    """The path of the SSH agent's socket; ``None`` when the environment names no agent."""
    path = get("SSH_AUTH_SOCK")
    return Path(path) if path else None


def display() -> str | None:
    """The graphical display of the user's session; ``None`` where no window can be opened."""
    return get("WAYLAND_DISPLAY") or get("DISPLAY")


def user() -> str:
    """The name of our user, which ssh also takes for the remote user; ``root`` if the system does not know a name."""
    name = get("LOGNAME") or get("USER") or get("USERNAME")
    if name:
        return name
    if sys.platform == "win32":
        return "root"
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run with a uid that has no entry
        return "root"


def home() -> Path:
    """The user's home folder. Raises GPUMeshError if there is none (a service without HOME and without an entry in
    passwd)."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise GPUMeshError("cannot tell your home folder", hint="set HOME") from error


def config_dir() -> Path:
    """The folder for our configuration. The folder may not exist.

    It is ``$XDG_CONFIG_HOME/gpumesh``; without this variable ``~/.config/gpumesh``. On macOS without the variable, it
    is ``~/Library/Application Support/gpumesh`` if there is no ``~/.config/gpumesh``. On Windows it is in APPDATA.
    """
    if sys.platform == "win32":
        return Path(get("APPDATA") or home() / "AppData" / "Roaming") / _APP
    if (xdg_folder := _absolute_path("XDG_CONFIG_HOME")) is not None:
        return xdg_folder / _APP
    if sys.platform == "darwin" and not (home() / ".config" / _APP).is_dir():
        return home() / "Library" / "Application Support" / _APP
    return home() / ".config" / _APP


def runtime_dir() -> Path:
    """The folder for sockets and locks. Makes the folder, private to the user (0700).

    The folder is ``$XDG_RUNTIME_DIR/gpumesh``, else ``/tmp/gpumesh-UID``. Both paths are short, because a Unix socket's
    path may not be long. The system empties the folder at logout or restart. Raises GPUMeshError when another user
    could access the folder.
    """
    if sys.platform == "win32":
        return _make_private(Path(get("LOCALAPPDATA") or home() / "AppData" / "Local") / _APP / "run")
    base = _absolute_path("XDG_RUNTIME_DIR")
    # After `su` or `sudo` the variable may still be another user's.
    if base is not None and _is_ours(base):
        return _make_private(base / _APP)
    return _make_private(Path("/tmp") / f"{_APP}-{os.geteuid()}")  # noqa: S108 - checked by _make_private


def runtime_dirs() -> tuple[Path, ...]:
    """The existing, private folders that ``runtime_dir`` may have returned for this user.

    There can be two folders: a service or a cron job has no XDG_RUNTIME_DIR, while the same user's shell has. On
    Windows the result is empty: there are no locks (``file_lock``) that could show which files are stale.
    """
    if sys.platform == "win32":
        return ()
    # Without the variable, we look at the folder that systemd gives to the user's other sessions.
    base = _absolute_path("XDG_RUNTIME_DIR") or Path(f"/run/user/{os.geteuid()}")
    candidates = (base / _APP, Path("/tmp") / f"{_APP}-{os.geteuid()}")  # noqa: S108 - checked below
    folders = []
    for folder in candidates:
        with contextlib.suppress(OSError):  # the folder does not exist
            if _privacy_problem(folder.lstat()) is None:
                folders.append(folder)
    return tuple(folders)


def state_dir() -> Path:
    """The folder for files that outlive a run (logs, measured results). Makes the folder, private to the user (0700).

    The folder is below the runtime folder if the user's home cannot be written to (in a container, for a service).
    """
    if sys.platform == "win32":
        return _make_private(Path(get("LOCALAPPDATA") or home() / "AppData" / "Local") / _APP)
    if (xdg_folder := _absolute_path("XDG_STATE_HOME")) is not None:
        return _make_private(xdg_folder / _APP)
    if sys.platform == "darwin":
        return _make_private(home() / "Library" / "Application Support" / _APP)
    try:
        return _make_private(home() / ".local" / "state" / _APP)
    except GPUMeshError:  # the home cannot be written to
        return _make_private(runtime_dir() / "state")


def _absolute_path(variable: str) -> Path | None:
    """The absolute path in a variable; ``None`` for a relative path, which the XDG specification requires to ignore."""
    path = get(variable)
    return Path(path) if path and os.path.isabs(path) else None


def _is_ours(folder: Path) -> bool:
    """Whether ``folder`` is a folder that belongs to our user and in which we can make files."""
    try:
        status = folder.stat()
    except OSError:  # it does not exist, or we may not look into it
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and os.access(folder, os.W_OK | os.X_OK)


def _make_private(folder: Path) -> Path:
    """Makes ``folder`` if it is missing, and returns it. If other users can read the folder, takes that right from
    them.

    Raises GPUMeshError if the path is not a real folder of ours, or if others may write to the folder: in a shared
    folder such as /tmp, another user may have made a link or a folder of that name first.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if sys.platform == "win32":  # the folder is in the user's own profile, which Windows keeps private
            return folder
        problem = _privacy_problem(status)
        others_have_rights = bool(stat.S_IMODE(status.st_mode) & 0o077)
        if problem is None and others_have_rights:
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
    """The reason why a folder with this ``status`` cannot be private, or ``None``. The reason is the end of a sentence
    that begins with the folder's path."""
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a folder"
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if stat.S_IMODE(status.st_mode) & 0o022:
        return "may be written to by other users"
    return None
