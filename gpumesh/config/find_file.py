"""Finds the mesh.yaml to use: named by the user, in the current folder, or in the user's configuration folder.

Does not import yaml, so that quick commands stay quick.
"""

from __future__ import annotations

import os
from pathlib import Path

from gpumesh.config import environment, untrusted_file
from gpumesh.errors import UsageError
from gpumesh.text.quoting import paste_command

FILE_NAME = "mesh.yaml"


def find_config(explicit: Path | None = None) -> Path:
    """The resolved path of the mesh.yaml to use: ``explicit``, else ``$GPUMESH_CONFIG``, else ``./mesh.yaml``, else the
    file in the user's configuration folder.

    Raises UsageError when there is no such file, when the named path is not a file, or when another user may have
    written the file in the current folder.
    """
    if explicit is not None:
        return _resolve_file(Path(explicit), origin="")
    variable = environment.get("GPUMESH_CONFIG")
    if variable is not None:
        return _resolve_file(Path(variable), origin=" (named by $GPUMESH_CONFIG)")
    local_file = Path(FILE_NAME)
    user_file = environment.config_dir() / FILE_NAME
    if _name_exists(local_file):
        path = _resolve_file(local_file, origin="")  # first, because this has the message for a link that leads nowhere
        _refuse_untrusted(local_file)
        return path
    if _name_exists(user_file):
        return _resolve_file(user_file, origin="")
    hint = "`gpumesh init` writes one, `gpumesh demo` needs none, `--config FILE` names one"
    if _name_exists(Path("mesh.yml")):
        hint = "there is a mesh.yml here: rename it to mesh.yaml, or name it with --config"
    raise UsageError(f"there is no {FILE_NAME}: neither here nor at {user_file}", hint=hint)


def search_paths(explicit: Path | None = None) -> tuple[Path, ...]:
    """The paths at which ``find_config`` looks for a file, in the same order, whether or not the files exist."""
    named_path = explicit or environment.get("GPUMESH_CONFIG")
    if named_path is not None:
        return (Path(named_path),)
    return Path(FILE_NAME), environment.config_dir() / FILE_NAME


def display_path(path: Path) -> str:
    """The path as a person would write it: relative to the current folder if it is below that folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # the path is elsewhere; the current folder does not exist any more
        return str(path)


def _name_exists(path: Path) -> bool:
    """Whether anything exists at ``path``. A dangling link counts: it must be reported, not ignored."""
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL in the name
        return False


def _refuse_untrusted(local_file: Path) -> None:
    """Raises UsageError if another user may have written this file, which our user did not name."""
    try:
        reason = untrusted_file.untrusted_reason(local_file)
    except OSError as error:
        raise UsageError(f"cannot use {local_file}: {error.strerror}") from error
    if reason is not None:
        raise UsageError(
            f"the {local_file} in this folder {reason}, so it is not used without being named",
            hint="look at what it does, and if you want that, name it: "
            + paste_command("gpumesh --config {FILE} …", FILE=f"./{local_file}"),
        )


def _resolve_file(path: Path, origin: str) -> Path:
    """Returns the resolved path of an existing file. Raises UsageError when ``path`` is a folder or does not exist.

    ``origin`` follows the file's name in the error's message: it says where that name comes from.
    """
    text = str(path)
    name = (text if text.isprintable() else repr(text)) + origin
    try:
        if path.is_dir():
            file_inside = path / FILE_NAME
            hint = f"name the {FILE_NAME} itself"
            if file_inside.is_file():
                hint = f"did you mean {display_path(file_inside)}?"
            raise UsageError(f"{name} is a folder, not a {FILE_NAME}", hint=hint)
        if not path.exists():
            hint = "it is a link that leads nowhere" if path.is_symlink() else "`gpumesh init` writes one"
            raise UsageError(f"{name} does not exist", hint=hint)
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, circular links
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"cannot use {name}: {reason}") from error
