"""What a service runs, and the first line of the file that defines it, which tells our own files from others. Pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

# A name goes into names of files and into command lines.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SIGNATURE = re.compile(r"Written by `gpumesh service install`; unchanged: ([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class ServiceDefinition:
    """What the service runs: ``program`` with its first arguments, for the mesh.yaml ``config``. All paths are
    absolute.

    ``variables_file`` has the variables that mesh.yaml names, one ``NAME=value`` a line; it need not exist. ``user`` is
    the user of a service of the whole system; ``None`` for a service of our own user.
    """

    name: str
    program: tuple[str, ...]
    config: Path
    variables_file: Path
    user: str | None = None


class FileOrigin(StrEnum):
    """Who has written a unit or an agent."""

    MISSING = "missing"
    OURS = "ours"
    CHANGED = "changed"  # ours, and edited since
    FOREIGN = "foreign"


def is_valid_name(name: str) -> bool:
    """Whether a service may have this name."""
    return _NAME.fullmatch(name) is not None


def signature(body: str) -> str:
    """The text of a comment that goes with ``body``, and with no other text."""
    return f"Written by `gpumesh service install`; unchanged: {_digest(body)}"


def find_origin(text: str | None, *, comment_end: str = "") -> FileOrigin:
    """Tells who has written the text of a file; ``None``: there is no file. ``comment_end`` follows the signature, on
    its line."""
    if text is None:
        return FileOrigin.MISSING
    match = _SIGNATURE.search(text)
    if match is None:
        return FileOrigin.FOREIGN
    body = text[match.end() :].removeprefix(f"{comment_end}\n")
    return FileOrigin.OURS if match[1] == _digest(body) else FileOrigin.CHANGED


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode("utf-8", "surrogateescape")).hexdigest()
