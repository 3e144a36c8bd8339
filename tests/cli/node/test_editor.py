"""A node's part of mesh.yaml in a person's editor: errors come back with what was typed, and nothing typed is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh.cli.node.edited_node import edit_node
from gpumesh.cli.node.editor import EditCancelled, EditorFailed, edit_in_editor
from gpumesh.config.editing import node_changes
from gpumesh.config.editing.node_changes import ChangedText
from gpumesh.errors import UsageError

FILE = Path("/nowhere/mesh.yaml")
TEXT = "nodes:\r\n  - name: a # mine\r\n    backend: {url: http://127.0.0.1:1}\r\n"
ENTRY = TEXT.removeprefix("nodes:\r\n")


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that appends what it is shown to ``shown``, and makes the changes of ``script`` (for sed), a line for
    each time that it is started."""
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    program = tmp_path / "my editor"
    program.write_text(
        f"#!/bin/sh\ncat \"$2\" >> '{tmp_path}/shown'\n"
        f"line=$(head -n 1 '{tmp_path}/script'); sed -i 1d '{tmp_path}/script'\n"
        'case $line in exit*) $line;; *) sed -i "$line" "$2";; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("EDITOR", f"'{program}' --wait")
    return tmp_path


def edit(editor: Path, *script: str) -> ChangedText:
    (editor / "script").write_text("".join(f"{line}\n" for line in script))
    return edit_in_editor("a", ENTRY, lambda entry: node_changes.replace_node(FILE, TEXT, "a", entry))


def left(editor: Path) -> list[str]:
    return [path.read_text() for path in editor.glob("gpumesh-a-*.yaml")]


def test_a_change_is_taken_and_the_file_stays_as_it_was_elsewhere(editor: Path) -> None:
    changed = edit(editor, "s/:1}/:2}/")
    assert changed.text == TEXT.replace(":1}", ":2}")
    assert left(editor) == []
    assert ENTRY.replace("\r", "") in (editor / "shown").read_text()


def test_an_error_opens_the_editor_again_with_what_was_typed(editor: Path) -> None:
    changed = edit(editor, "s/backend/bakend/", "s/:1}/:3}/", "s/bakend/backend/")
    assert changed.text == TEXT.replace(":1}", ":3}")
    shown = (editor / "shown").read_text()
    assert "bakend: unknown key 'bakend'; did you mean backend?\n" in shown
    assert "    bakend: {url: http://127.0.0.1:3}\n" in shown
    assert shown.count("This cannot be used") == 2


@pytest.mark.parametrize("script", [["s/x/x/"], ["d"], ["/name/d; /backend/d"]])
def test_no_change_is_no_change(editor: Path, script: list[str]) -> None:
    with pytest.raises(EditCancelled):
        edit(editor, *script)
    assert left(editor) == []


@pytest.mark.parametrize(("last", "error"), [("s/x/x/", EditCancelled), ("exit 3", EditorFailed)])
def test_what_was_typed_in_vain_is_kept(
    editor: Path, last: str, error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error):
        edit(editor, "s/backend/bakend/", last)
    (kept,) = left(editor)
    assert "    bakend: {url" in kept
    assert "what you typed is in " in capsys.readouterr().err


def test_a_program_that_always_makes_a_mistake_is_not_asked_for_ever(editor: Path) -> None:
    (editor / "script").write_text("s/backend/bakend/\ns/:1/:2/\ns/:2/:3/\n")
    with pytest.raises(UsageError, match="unknown key 'bakend'"):
        edit_in_editor("a", ENTRY, lambda entry: node_changes.replace_node(FILE, TEXT, "a", entry), rounds=3)
    (kept,) = left(editor)
    assert ":3}" in kept


def test_an_editor_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "no-such-editor-here")
    with pytest.raises(EditorFailed, match="no-such-editor-here"):
        edit_in_editor("a", ENTRY, lambda entry: node_changes.replace_node(FILE, TEXT, "a", entry))


def test_a_node_that_another_command_has_changed_meanwhile_is_not_overwritten(tmp_path: Path, editor: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_bytes(TEXT.encode())
    program = editor / "my editor"
    program.write_text(f"#!/bin/sh\nsed -i s/mine/theirs/ '{file}'\nsed -i s/mine/ours/ \"$2\"\n")
    with pytest.raises(UsageError, match=r"a was changed in mesh\.yaml meanwhile"):
        edit_node(file, TEXT, "a")
    assert "theirs" in file.read_text()
    (kept,) = left(editor)
    assert "ours" in kept
    program.write_text('#!/bin/sh\nsed -i s/theirs/ours/ "$2"\n')
    text = file.read_bytes().decode()
    assert edit_node(file, text, "a").text == file.read_bytes().decode() == TEXT.replace("mine", "ours")
