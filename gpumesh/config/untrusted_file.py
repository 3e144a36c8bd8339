"""Checks whether another user could have written the mesh.yaml in the current folder, which our user did not name.

Such a file could run any program (`address_from`), send our variables to foreign URLs, and offer our keys to foreign
hosts. So a file that another user owns or could have written is refused. A user who wants to use the file names it
with ``--config``.

The owners are checked as git does for a repository (safe.directory; git ignores modes). The modes are checked as sshd
does for ``authorized_keys`` (StrictModes): neither a group nor all users may have permission to write to the file or to
its folder. Two exceptions: the owner's private group, as in Debian's sshd, and a folder with the sticky bit. Folders
further up are not checked: git does not check them either, and sshd only up to the home folder, outside which a project
may lie.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gpumesh.config import environment

MAX_LINKS = 40  # the kernel's limit


def untrusted_reason(path: Path) -> str | None:
    """The reason why the file is not trusted; ``None`` if only trusted users (``_trusted_users``: we, root) could have
    written the file.

    The reason is the end of a sentence that begins with the file's name. If ``path`` is a link, the link, its target
    and the folder of each are checked. Raises OSError.
    """
    if not hasattr(os, "geteuid"):  # Windows
        return None
    trusted = _trusted_users()
    for followed in _follow_links(path):
        reason = _folder_problem(followed.parent, trusted) or _file_problem(followed, trusted)
        if reason is not None:
            return reason if followed == path else f"leads to {followed}, which {reason}"
    return None


def _trusted_users() -> frozenset[int]:
    """The user ids of our user, of root, and of the user who became root by sudo: with `sudo gpumesh`, the mesh.yaml is
    usually that user's own file."""
    trusted = {0, os.geteuid()}
    if os.geteuid() == 0:  # only for root: any other user could set SUDO_UID to any number
        sudo_uid = environment.get("SUDO_UID") or ""
        if sudo_uid.isascii() and sudo_uid.isdecimal():
            trusted.add(int(sudo_uid))
    return frozenset(trusted)


def _follow_links(path: Path) -> Iterator[Path]:
    """Yields ``path``. While the last path is a link, yields the path that the link leads to, ``MAX_LINKS`` paths at
    most: links may form a circle."""
    for _ in range(MAX_LINKS):
        yield path
        if not path.is_symlink():
            return
        path = path.parent / path.readlink()  # an absolute target replaces ``path.parent``


def _folder_problem(folder: Path, trusted: frozenset[int]) -> str | None:
    """The reason why a file in this folder is not trusted, or ``None``."""
    status = folder.stat()
    if status.st_uid not in trusted:
        return f"lies in a folder of another user ({_user_label(status.st_uid)})"
    # A user who may write to a folder can rename any other file of ours there to mesh.yaml: we would own the file, so
    # ``_file_problem`` would find nothing. In a folder with the sticky bit, such as /tmp, users cannot rename each
    # other's files.
    if status.st_mode & stat.S_ISVTX:
        return None
    if status.st_mode & stat.S_IWOTH:
        return "lies in a folder that every user of this machine may write to"
    if _others_may_write_as_group(status):
        return f"lies in a folder that others may write to ({_group_label(status.st_gid)})"
    return None


def _file_problem(path: Path, trusted: frozenset[int]) -> str | None:
    """The reason why the file (or link) at ``path`` is not trusted, or ``None``."""
    status = path.lstat()
    if status.st_uid not in trusted:
        return f"belongs to another user ({_user_label(status.st_uid)})"
    if stat.S_ISLNK(status.st_mode):
        return None  # the mode of a link has no meaning
    if status.st_mode & stat.S_IWOTH:
        return "may be written to by every user of this machine"
    if _others_may_write_as_group(status):
        return f"may be written to by others ({_group_label(status.st_gid)})"
    return None


def _others_may_write_as_group(status: os.stat_result) -> bool:
    """Whether the group of the file or folder may write to it, and the group is not the private group of the owner."""
    return bool(status.st_mode & stat.S_IWGRP) and not _is_private_group(status.st_gid, status.st_uid)


def _is_private_group(gid: int, uid: int) -> bool:
    """Whether the user ``uid`` is the only member of the group ``gid``.

    Many systems make such a group for each user, and make the user's files writable for the group. Root's group never
    counts: on some systems it is `wheel`, with other members.
    """
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:  # without an entry, nobody can tell the members: the group counts as not private
        return False
    is_own_group = user.pw_gid == gid and group.gr_name == user.pw_name
    has_other_members = any(member != user.pw_name for member in group.gr_mem)
    return gid != 0 and is_own_group and not has_other_members


def _user_label(uid: int) -> str:
    """Returns the user's name and number for a message; only the number if the system knows no name."""
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name}, uid {uid}"
    except KeyError:
        return f"uid {uid}"


def _group_label(gid: int) -> str:
    """Returns the group's name for a message; its number if the system knows no name."""
    import grp

    try:
        return f"group {grp.getgrgid(gid).gr_name}"
    except KeyError:
        return f"group {gid}"
