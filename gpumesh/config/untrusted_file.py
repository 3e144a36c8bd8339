"""Whether a mesh.yaml that nobody named, but that lay in the current folder, may be somebody else's.

Such a file does whatever its writer wants: it runs `address_from`, sends variables of ours to URLs of theirs, and
offers our keys to their hosts. So one that another user owns, or could have written, is refused as a whole, as git
refuses such a repository (safe.directory). Whoever wants it names it with ``--config``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gpumesh.config import environment

MOST_LINKS = 40  # as the kernel has it


def untrusted_reason(path: Path) -> str | None:
    """What completes a sentence that begins with the file's name; ``None``: only root and we could have written it.

    Links count, and what they lead to, and the folder of each. Raises OSError.
    """
    if not hasattr(os, "geteuid"):
        return None
    trusted = _trusted()
    for place in _chain(path):
        reason = _folder_problem(place.parent, trusted) or _file_problem(place, trusted)
        if reason is not None:
            return reason if place == path else f"leads to {place}, which {reason}"
    return None


def _trusted() -> frozenset[int]:
    """We, root, and who has become root by sudo."""
    ours = {0, os.geteuid()}
    if os.geteuid() == 0:
        before = environment.get("SUDO_UID") or ""
        if before.isascii() and before.isdecimal():
            ours.add(int(before))
    return frozenset(ours)


def _chain(path: Path) -> Iterator[Path]:
    """The file's name and, if it is a link, all that it leads to."""
    for _ in range(MOST_LINKS):
        yield path
        if not path.is_symlink():
            return
        path = path.parent / path.readlink()


def _folder_problem(folder: Path, trusted: frozenset[int]) -> str | None:
    found = folder.stat()
    if found.st_uid not in trusted:
        return f"lies in a folder of another user ({_name(found.st_uid)})"
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        return "lies in a folder that every user of this machine may write to"
    return None


def _file_problem(path: Path, trusted: frozenset[int]) -> str | None:
    found = path.lstat()
    if found.st_uid not in trusted:
        return f"belongs to another user ({_name(found.st_uid)})"
    if stat.S_ISLNK(found.st_mode):
        return None  # its mode means nothing
    if found.st_mode & stat.S_IWOTH:
        return "may be written to by every user of this machine"
    if found.st_mode & stat.S_IWGRP and not _private(found.st_gid, found.st_uid):
        return f"may be written to by others ({_group(found.st_gid)})"
    return None


def _private(gid: int, uid: int) -> bool:
    """Whether the group is that user's own and has nobody else in it, as many systems make one for each user (whose
    files are then writable for it). Root's never counts: it is `wheel` in some places."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    mine = user.pw_gid == gid and group.gr_name == user.pw_name
    return gid != 0 and mine and set(group.gr_mem) <= {user.pw_name}


def _name(uid: int) -> str:
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name}, uid {uid}"
    except KeyError:
        return f"uid {uid}"


def _group(gid: int) -> str:
    import grp

    try:
        return f"group {grp.getgrgid(gid).gr_name}"
    except KeyError:
        return f"group {gid}"
