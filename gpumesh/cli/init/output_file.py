"""Writes the mesh.yaml of `init`, and refuses to overwrite a file without ``--force``."""

from __future__ import annotations

import os
from pathlib import Path

from gpumesh.errors import UsageError
from gpumesh.files import atomic_file
from gpumesh.text.quoting import shell_word


def check_output(path: Path, *, force: bool) -> None:
    """Raises UsageError when ``write_output`` could not write the file. `init` calls this first, before the steps that
    take time."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint=f"--output {shell_word(str(path / 'mesh.yaml'))}")
    if path.exists() and not force:
        raise UsageError(
            f"{path} is there already",
            hint="`gpumesh node add 'ssh …'` adds a host to it; --force overwrites it, --output names another file",
        )
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}")


def write_output(path: Path, text: str, *, force: bool) -> None:
    """Writes the file completely or not at all. Without ``force`` it never overwrites a file, not even a file that was
    made after ``check_output``. Raises UsageError."""
    umask = os.umask(0)  # the only call that returns the umask also sets it, so it is set back
    os.umask(umask)
    write = atomic_file.replace if force else atomic_file.create
    try:
        write(path, text, mode=0o666 & ~umask)  # the mode that a new file usually gets
    except FileExistsError as error:
        raise UsageError(f"{path} is there already", hint="--force overwrites it") from error
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
