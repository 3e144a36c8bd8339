"""Notices that a person has mended, on this machine, what keeps a tunnel from connecting: a known_hosts file, a key.

Whoever changed the file does not matter: `gpumesh trust` for this mesh or another, ``ssh``, or an editor.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from gpumesh.config import environment
from gpumesh.errors import (
    AuthRefused,
    HostKeyChanged,
    HostKeyRevoked,
    HostKeyUnknown,
    KeyUnreadable,
    TransportUnsupported,
)
from gpumesh.topology import SshSpec, TransportKind

POLL_S = 1.0  # between two looks at the files; also the least time between two attempts because of them

_SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")  # which only OpenSSH reads
_HOST_KEY_CODES = frozenset({HostKeyUnknown.code, HostKeyChanged.code, HostKeyRevoked.code})
_LOGIN_KEY_CODES = frozenset({KeyUnreadable.code, AuthRefused.code})

FileStamp = tuple[int, int, int, int, int]
"""Inode, size, mode, and the times of the last change of content and of attributes in ns: what a change changes."""


def list_repair_files(ssh: SshSpec, code: str) -> tuple[Path, ...]:
    """The files whose change may end the failure with this code. Pure, but for the user's home folder.

    A file that has nothing to do with the failure is left out: an attempt to log in that must fail again may count
    against us on the host.
    """
    files: tuple[Path, ...] = ()
    is_openssh = ssh.transport is TransportKind.OPENSSH
    if code in _HOST_KEY_CODES:
        files = (*ssh.known_hosts_files, *((_SYSTEM_KNOWN_HOSTS,) if is_openssh else ()))
    elif code in _LOGIN_KEY_CODES:
        files = ssh.identity_files
    elif code == TransportUnsupported.code and is_openssh:
        files = (environment.home() / ".ssh" / "config",)
    return tuple(file.expanduser() for file in files)


class RepairWatch:
    """The files that one tunnel uses, as they were when its last attempt to connect began."""

    def __init__(self, ssh: SshSpec) -> None:
        self._ssh = ssh
        codes = (*_HOST_KEY_CODES, *_LOGIN_KEY_CODES, TransportUnsupported.code)
        self._files = {file for code in codes for file in list_repair_files(ssh, code)}
        self._stamps: dict[Path, FileStamp | None] = {}  # of ``_files``

    def __repr__(self) -> str:
        return f"<RepairWatch {len(self._files)} files>"

    def note_attempt(self) -> None:
        """Called before each attempt: the attempt will read the files as they are now, or newer."""
        self._stamps = {file: _read_stamp(file) for file in self._files}

    def is_changed(self, code: str) -> bool:
        """Whether a file has changed since ``note_attempt`` whose change may end the failure with this code."""
        files = list_repair_files(self._ssh, code)
        return any(_read_stamp(file) != self._stamps.get(file) for file in files)

    async def watch(
        self, code: str, on_change: Callable[[], None], *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """Calls ``on_change`` once, when ``is_changed``, but not before ``POLL_S`` are over. Returns at once if no file
        can end the failure."""
        if not list_repair_files(self._ssh, code):
            return
        await sleep(POLL_S)
        while not self.is_changed(code):
            await sleep(POLL_S)
        on_change()


def _read_stamp(file: Path) -> FileStamp | None:
    """What shows whether the file has changed; ``None`` if there is no such file, or if it cannot be reached."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mode, status.st_mtime_ns, status.st_ctime_ns)
