"""Changes a node of mesh.yaml: by the words ``key=value``, or in an editor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gpumesh.cli.node.editor import MAX_ROUNDS, edit_in_editor
from gpumesh.cli.node.mesh_change import change_file
from gpumesh.config.editing import edit, node_changes, node_entries
from gpumesh.config.editing.key_values import read_edits
from gpumesh.config.editing.node_changes import ChangedText
from gpumesh.errors import UsageError


def set_node_values(path: Path, name: str, words: Sequence[str]) -> ChangedText:
    """Sets values of the node, such as ``ssh.port=17446``. Raises GPUMeshError, and then the file is as it was."""
    edits = read_edits(words)
    return change_file(path, lambda text: node_changes.set_values(path, text, name, edits))


def edit_node(path: Path, text: str, name: str) -> ChangedText:
    """Lets a person edit the node's part of ``text``, the file's text now. Raises EditCancelled and GPUMeshError, and
    then the file is as it was."""
    entry = _find_entry(path, text, name)

    def change(new_entry: str) -> ChangedText:
        """Puts the edited entry into the file. Raises UsageError if the file's entry is no longer the one that was
        edited."""

        def replace_entry(current_text: str) -> ChangedText:
            if _find_entry(path, current_text, name) != entry:
                raise UsageError(
                    f"{name} was changed in {path.name} meanwhile", hint="leave the editor, and begin again"
                )
            return node_changes.replace_node(path, current_text, name, new_entry)

        return change_file(path, replace_entry)

    # A program without a terminal would make the same mistake again.
    return edit_in_editor(name, entry, change, rounds=MAX_ROUNDS if sys.stdin.isatty() else 1)


def _find_entry(path: Path, text: str, name: str) -> str:
    """The node's part of the text. Raises UsageError for a node that is not there."""
    return node_entries.entry_text(text, node_changes.find_node(edit.parse_edited(path, text), name))
