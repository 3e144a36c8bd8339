"""Lets a person change a node's part of mesh.yaml in an editor, as `kubectl edit` does: asks again after an error."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import typer

from gpumesh.cli.views.safe_text import clean_line
from gpumesh.config import environment
from gpumesh.config.editing.node_changes import ChangedText
from gpumesh.errors import GPUMeshError
from gpumesh.text.quoting import shell_word

MAX_ROUNDS = 20  # a program in the place of an editor may make the same mistake for ever
_REMARK = "#| "  # begins the lines that are not a part of the node


class EditCancelled(GPUMeshError):
    """A person has left the text as it was, or has emptied it."""


class EditorFailed(GPUMeshError):
    """The editor could not be started, or says that it failed."""


def edit_in_editor(
    name: str, entry: str, change: Callable[[str], ChangedText], *, rounds: int = MAX_ROUNDS
) -> ChangedText:
    """Opens an editor on ``entry``, the text of the node ``name`` in mesh.yaml. Returns what ``change`` returns for the
    new text. While ``change`` raises GPUMeshError, the editor opens again, with the error above what was typed, up to
    ``rounds`` times in all; then the error is raised.

    Raises EditCancelled and EditorFailed. What was typed in vain stays in a file, whose name is shown.
    """
    original = entry.replace("\r\n", "\n").rstrip("\n") + "\n"
    text = original
    remark = f"{name}, as in mesh.yaml. Save it to change the node; leave it as it is to change nothing."
    descriptor, path = _make_file(name)
    os.close(descriptor)
    try:
        while True:
            rounds -= 1
            path.write_text(_with_remarks(remark, text), encoding="utf-8")
            _run_editor(path)
            typed = _without_remarks(path.read_text(encoding="utf-8", errors="replace"))
            if not typed.strip() or typed == text:
                raise EditCancelled("nothing was changed")
            text = typed
            try:
                changed = change(typed)
            except GPUMeshError as error:
                if rounds <= 0:
                    raise
                remark = f"This cannot be used:\n{error.message}" + (f"\nhint: {error.hint}" if error.hint else "")
            else:
                text = original  # nothing has to be kept
                return changed
    finally:
        if text == original:
            path.unlink(missing_ok=True)
        else:
            typer.echo(clean_line(f"what you typed is in {path}"), err=True)


def _make_file(name: str) -> tuple[int, Path]:
    """Makes an empty file that only this user can read. Returns its descriptor and its path, in this order."""
    safe_name = "".join(character if character.isalnum() else "-" for character in name)[:40]
    descriptor, path = tempfile.mkstemp(prefix=f"gpumesh-{safe_name}-", suffix=".yaml")
    return descriptor, Path(path)


def _run_editor(path: Path) -> None:
    """Runs ``$VISUAL`` or ``$EDITOR``, else vi, on the file. Raises EditorFailed."""
    editor = environment.get("VISUAL") or environment.get("EDITOR") or "vi"
    # Ctrl-C is the editor's while it runs. A handler of Python's, unlike SIG_IGN, does not pass on to the editor.
    previous_handler = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        # The variable may have options and quotes (``code --wait``): a shell reads it, as with git and kubectl.
        command = ["/bin/sh", "-c", f"{editor} {shell_word(str(path))}"]
        status = subprocess.run(command, check=False, env=environment.child_environment()).returncode
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    if status != 0:
        raise EditorFailed(
            f"the editor ({editor}) ended with status {status}, so nothing was changed",
            hint="$EDITOR names another one; `gpumesh node edit NODE KEY=VALUE` needs none",
        )


def _with_remarks(remark: str, text: str) -> str:
    return "".join(f"{_REMARK}{line}\n" for line in remark.splitlines()) + text


def _without_remarks(text: str) -> str:
    lines = text.replace("\r\n", "\n").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(_REMARK.rstrip()))
