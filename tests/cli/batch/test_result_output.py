"""Where results are written: what a file is before, during and after it, and what is never overwritten."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from gpumesh.cli.batch.result_output import open_result_output
from gpumesh.errors import UsageError


@pytest.mark.parametrize("grows", [False, True])
def test_a_file_is_there_when_it_is_whole_or_grows(tmp_path: Path, grows: bool) -> None:
    out = tmp_path / "out.jsonl"
    umask = os.umask(0o027)
    try:
        with open_result_output(str(out), force=False, grows=grows) as write:
            write([b"1", b"2"])
            assert (out.read_bytes() if out.exists() else None) == (b"1\n2\n" if grows else None)
            write([])
            write([b"3"])
    finally:
        os.umask(umask)
    assert (out.read_bytes(), out.stat().st_mode & 0o777) == (b"1\n2\n3\n", 0o640)


def test_a_file_with_something_is_overwritten_by_force_only(tmp_path: Path) -> None:
    out, link = tmp_path / "out.jsonl", tmp_path / "link"
    out.touch(mode=0o604)
    link.symlink_to(out)
    with open_result_output(str(link), force=False, grows=False) as write:  # it is empty
        write([b"old"])
    with pytest.raises(UsageError, match="is there already"), open_result_output(str(link), force=False, grows=True):
        pass
    with contextlib.suppress(KeyboardInterrupt), open_result_output(str(link), force=True, grows=False) as write:
        write([b"new"])
        raise KeyboardInterrupt
    assert out.read_bytes() == b"old\n"
    with open_result_output(str(link), force=True, grows=False) as write:
        write([b"new"])
    assert (out.read_bytes(), out.stat().st_mode & 0o777) == (b"new\n", 0o604)
    assert link.is_symlink()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for name, message in ((str(tmp_path), "is a folder"), (str(tmp_path / "none" / "out"), "No such file")):
        for grows in (False, True):
            with pytest.raises(UsageError, match=message), open_result_output(name, force=True, grows=grows):
                pass
    with open_result_output("/dev/null", force=False, grows=False) as write:
        write([b"1"])
    assert Path("/dev/null").is_char_device()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_an_error_of_writing_names_the_file() -> None:
    opened = open_result_output("/dev/full", force=False, grows=True)
    with pytest.raises(OSError, match="No space left") as raised, opened as write:
        write([b"1"])
    assert raised.value.filename == "/dev/full"


def test_stdout_gets_no_control_of_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with open_result_output(None, force=False, grows=False) as write:
        write(['{"a": "ü\u202e\x9b31m\x1b[0m\\u001b\\n"}'.encode(), b"\xff"])
    assert capsys.readouterr().out == '{"a": "ü\\u202e\\u009b31m[0m\\u001b\\n"}\n\ufffd\n'
