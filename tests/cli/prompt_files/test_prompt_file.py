"""A file of prompts: what is checked before any prompt is sent, and what is read from it then."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from gpumesh.cli.prompt_files.prompt_file import MAX_WRONG_LINES, open_prompts
from gpumesh.errors import UsageError


def read_texts(name: str) -> list[str]:
    with open_prompts(name) as prompts:
        pairs = [pair for pair in prompts.read(lambda _: True) if pair is not None]
    assert [index for index, _ in pairs] == list(range(prompts.count))
    return [entry.text for _, entry in pairs]


def test_what_is_read_is_as_in_a_file_that_was_read_at_once(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\n\n  two \r\n\xfc three".encode() + b"\xff\n")
    assert read_texts(str(file)) == ["one", "  two ", "ü three\ufffd"]
    file = tmp_path / "prompts.jsonl"
    file.write_text('\n{"prompt": "one"}\n"\\ud800"\n')
    assert read_texts(str(file)) == ["one", "\ud800"]


def test_a_pipe_is_read_once_and_gives_its_prompts_twice(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = "".join(f"prompt {number}\n" for number in range(20_000))  # more than a pipe holds
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    assert read_texts(str(pipe)) == text.splitlines()
    writer.join()


def test_all_wrong_lines_are_reported_with_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"promt": "b"}\n\n"c"\n5\n')
    with pytest.raises(UsageError) as raised, open_prompts(str(file)):
        pass
    assert raised.value.message.splitlines() == [
        f"{file} has 2 wrong lines; no prompt was sent",
        f"{file}:2: unknown key 'promt'",
        f"{file}:5: expected an object with a key `prompt`, or a string",
    ]
    file.write_text("5\n" * 50_000)
    with pytest.raises(UsageError) as raised, open_prompts(str(file)):
        pass
    lines = raised.value.message.splitlines()
    assert lines[0] == f"{file} has 50,000 wrong lines; no prompt was sent"
    assert lines[-1] == "… and 49,980 more"
    assert len(lines) == MAX_WRONG_LINES + 2
    file.write_text("\n \n")
    with pytest.raises(UsageError, match="has no prompts"), open_prompts(str(file)):
        pass


def test_prompts_that_are_not_wanted_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{number}"}) + "\n" for number in range(10)))
    with open_prompts(str(file)) as prompts:
        read = list(prompts.read(lambda index: index in (2, 9)))
    assert [pair[1].text if pair is not None else None for pair in read] == [None] * 2 + ["2"] + [None] * 6 + ["9"]


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    """Lines that another program appends belong to the next run; a prompt that changed is never sent."""
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    with open_prompts(str(file)) as prompts:
        with file.open("a") as appending:
            appending.write("three\n")
        assert len(list(prompts.read(lambda _: True))) == 2
        file.write_text("one\nnew\n")
        with pytest.raises(UsageError, match="was changed while its prompts were sent"):
            list(prompts.read(lambda _: True))
