"""The shell of a session, run by this machine's shells as an sshd runs it: its standard streams are pipes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.tunnels.remote_commands.remote_shell import END_LINE, KILL_LINE, READY_LINE, SHELL_COMMAND, is_shell_script
from tests.tunnels.polling import alive, wait_until

# ``sh`` may be one of the first kind; the login shell, which gets the command as text, one of the second.
SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]
LOGIN_SHELLS = [shell for shell in ("sh", "bash", "zsh", "fish", "tcsh") if shutil.which(shell)]


@contextlib.asynccontextmanager
async def shell(
    folder: Path, sh: str = "dash", login_shell: str = "sh", *, setsid: bool = True
) -> AsyncIterator[Process]:
    """The shell's process, which has printed its ready line. ``sh`` is the shell behind the name ``sh``."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "sh").symlink_to(str(shutil.which(sh)))
    for name in ("cat", "sleep", "pkill", "kill", "touch", *(("setsid",) if setsid else ())):
        found = shutil.which(name)
        if found is not None:
            (bin_folder / name).symlink_to(found)
    process = await asyncio.create_subprocess_exec(
        str(shutil.which(login_shell)), "-c", SHELL_COMMAND, stdin=PIPE, stdout=PIPE, stderr=DEVNULL,
        env={"PATH": str(bin_folder), "HOME": str(folder)},
    )  # fmt: skip
    try:
        async with asyncio.timeout(20):
            assert await read_line(process) == READY_LINE
            yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def read_line(process: Process) -> bytes:
    assert process.stdout is not None
    return (await process.stdout.readline()).rstrip(b"\n")


async def write(process: Process, data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)
    await process.stdin.drain()


@pytest.mark.parametrize("login_shell", LOGIN_SHELLS)
async def test_every_login_shell_starts_it(tmp_path: Path, login_shell: str) -> None:
    async with shell(tmp_path, login_shell=login_shell) as process:
        await write(process, b"echo \"it's\" 'a  b' $((6*7))\n")
        assert await read_line(process) == b"it's a  b 42"


@pytest.mark.parametrize("sh", SHELLS)
async def test_one_command_line_after_another(tmp_path: Path, sh: str) -> None:
    async with shell(tmp_path, sh) as process:
        for number in range(3):
            await write(process, b"cat; sh -c 'exit %d'; echo over $?\n" % number)  # its own input is empty
            assert await read_line(process) == b"over %d" % number
            await write(process, END_LINE)
            assert await read_line(process) == READY_LINE
        process.stdin.close()  # type: ignore[union-attr]
        assert await process.wait() == 0


@pytest.mark.parametrize("setsid", [True, False])
@pytest.mark.parametrize("sh", SHELLS)
async def test_a_killed_command_line_ends_with_what_it_started(tmp_path: Path, sh: str, setsid: bool) -> None:
    async with shell(tmp_path, sh, setsid=setsid) as process:
        await write(process, b"sleep 600 & echo $! $$; wait\n")
        pids = [int(pid) for pid in (await read_line(process)).split()]
        assert all(alive(pid) for pid in pids)
        await write(process, KILL_LINE)
        assert await read_line(process) == READY_LINE
        await wait_until(lambda: not any(alive(pid) for pid in pids), f"the end of {pids}")
        await write(process, b"echo again\n")
        assert await read_line(process) == b"again"


@pytest.mark.parametrize("setsid", [True, False])
@pytest.mark.parametrize("sh", SHELLS)
async def test_the_end_of_input_ends_the_command_line_and_what_it_started(
    tmp_path: Path, sh: str, setsid: bool
) -> None:
    async with shell(tmp_path, sh, setsid=setsid) as process:
        await write(process, b"sleep 600 & echo $! $$; wait\n")
        pids = [int(pid) for pid in (await read_line(process)).split()]
        process.stdin.close()  # type: ignore[union-attr]
        await wait_until(lambda: not any(alive(pid) for pid in pids), f"the end of {pids}")
        await process.wait()


@pytest.mark.parametrize("sh", SHELLS)
async def test_the_end_of_input_kills_nothing_when_no_command_line_runs(tmp_path: Path, sh: str) -> None:
    """The number of an ended process may belong to another one."""
    async with shell(tmp_path, sh) as process:
        await write(process, b"echo over\n")
        assert await read_line(process) == b"over"
        await write(process, END_LINE)
        assert await read_line(process) == READY_LINE
        process.stdin.close()  # type: ignore[union-attr]
        assert await process.wait() == 0, "the status of ``[ -z``: there was nothing to kill"


def test_the_command_is_one_line_that_csh_can_read() -> None:
    assert "\n" not in SHELL_COMMAND
    assert SHELL_COMMAND.count("'") == 2
    script = SHELL_COMMAND.split("'")[1]
    assert is_shell_script(script)
    assert not is_shell_script(script + " ")
    after = [script[index + 1] for index, character in enumerate(script) if character == "!"]
    assert set(after) == {" "}, "csh takes any other character for a reference to its history"
