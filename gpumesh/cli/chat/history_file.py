"""The file with the lines that were typed in chats: a JSON string a line, the newest last, for this user alone."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from gpumesh.files import atomic_file

MAX_ENTRIES = 1000
MAX_FILE_BYTES = 1 << 20  # a longer file is cut to its newest entries
MAX_ENTRY_CHARACTERS = 1 << 14  # a longer text, which was pasted, is not kept


def read_entries(path: Path) -> list[str]:
    """The entries, the oldest first; none if there is no file that can be read. A line that is no entry is left
    out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - MAX_FILE_BYTES, 0))  # a part of a line at the beginning is no entry
            lines = file.read(MAX_FILE_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, str):
                entries.append(entry)
    entries = entries[-MAX_ENTRIES:]
    if size > MAX_FILE_BYTES or len(lines) > 2 * MAX_ENTRIES:
        text = "".join(map(_encode, entries))
        with contextlib.suppress(OSError):
            atomic_file.replace(path, text[-MAX_FILE_BYTES // 2 :], sync=False)
    return entries


def add_entry(path: Path, text: str) -> None:
    """Appends an entry. Several chats may do so at the same time. A chat goes on without its history if the file cannot
    be written."""
    if len(text) > MAX_ENTRY_CHARACTERS:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
            os.write(descriptor, _encode(text).encode())
        finally:
            os.close(descriptor)


def _encode(text: str) -> str:
    return json.dumps(text) + "\n"  # in ASCII: an entry has no line break of any kind
