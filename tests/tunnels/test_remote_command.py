"""The script, run by this machine's shells as an sshd runs it: its standard streams are pipes or a socket."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import socket
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.tunnels.remote_commands.remote_command import SHELL_TEST, SHELL_TEST_OUTPUT, unwrap_killable, wrap_killable
from tests.tunnels.polling import alive, wait_until

SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that is the whole PATH, with ``sh`` being this shell and, as on a host without it, no ``setsid``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    found = shutil.which(request.param)
    assert found is not None
    (folder / "sh").symlink_to(found)
    for name in ("cat", "sleep", "pkill", "kill", "echo", "printf"):
        program = shutil.which(name)
        if program is not None:
            (folder / name).symlink_to(program)
    return folder


def add_setsid(folder: Path) -> None:
    program = shutil.which("setsid")
    if program is None:
        pytest.skip("there is no setsid")
    (folder / "setsid").symlink_to(program)


async def start(folder: Path, command: str) -> Process:
    return await asyncio.create_subprocess_exec(
        folder / "sh", "-c", wrap_killable(command), stdin=PIPE, stdout=PIPE, stderr=PIPE, env={"PATH": str(folder)}
    )


async def read_output(process: Process) -> tuple[bytes, bytes]:
    """Without ``communicate``: since Python 3.12 that closes the input at once, which ends the command."""
    assert process.stdout is not None
    assert process.stderr is not None
    out, err, _status = await asyncio.gather(process.stdout.read(), process.stderr.read(), process.wait())
    return out, err


@pytest.mark.parametrize("setsid", [True, False])
async def test_output_and_status_come_through_and_nothing_is_left(shell: Path, setsid: bool) -> None:
    if setsid:
        add_setsid(shell)
    process = await start(shell, shlex.join(["sh", "-c", "echo 'a  b'; echo err >&2; cat; exit 7"]))
    async with asyncio.timeout(20):
        out, err = await read_output(process)  # its own input is empty: ``cat`` ends at once
    assert (out, err, process.returncode) == (b"a  b\n", b"err\n", 7)


@pytest.mark.parametrize("setsid", [True, False])
async def test_the_end_of_input_ends_the_command_and_what_it_started(shell: Path, setsid: bool) -> None:
    if setsid:
        add_setsid(shell)
    inner = "sleep 600 & echo $! $$; wait"
    process = await start(shell, shlex.join(["sh", "-c", inner]))
    assert process.stdout is not None
    assert process.stdin is not None
    async with asyncio.timeout(20):
        pids = [int(pid) for pid in (await process.stdout.readline()).split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
        process.stdin.close()
        await wait_until(lambda: not any(alive(pid) for pid in pids), f"the end of {pids}")
        assert await process.stdout.read() == b""  # no process holds it open
        assert await process.wait() == 137


async def test_a_grandchild_ends_too_where_the_host_has_setsid(shell: Path) -> None:
    add_setsid(shell)
    process = await start(shell, shlex.join(["sh", "-c", "sh -c 'sleep 600 & echo $!; wait'; true"]))
    assert process.stdout is not None
    assert process.stdin is not None
    async with asyncio.timeout(20):
        pid = int(await process.stdout.readline())
        process.stdin.close()
        await wait_until(lambda: not alive(pid), "the end of the grandchild")
        await process.wait()


async def test_streams_may_be_one_socket(shell: Path) -> None:
    """An sshd without pipes uses one socket: a process that holds the input open also holds the output open."""
    add_setsid(shell)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            fd = theirs.fileno()
            process = await asyncio.create_subprocess_exec(
                shell / "sh", "-c", wrap_killable("echo over"), stdin=fd, stdout=fd, env={"PATH": str(shell)}
            )
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            assert await process.wait() == 0
            ours.shutdown(socket.SHUT_WR)  # as sshd does when the command has ended
            output = b""
            while piece := await loop.sock_recv(ours, 100):
                output += piece
            assert output == b"over\n"


async def test_a_signal_shows_as_128_plus_its_number(shell: Path) -> None:
    add_setsid(shell)
    process = await start(shell, shlex.join(["sh", "-c", "kill -9 $$"]))
    async with asyncio.timeout(20):
        assert await process.wait() == 137
    process = await start(shell, "no-such-command-here")
    async with asyncio.timeout(20):
        out, err = await read_output(process)
    assert (out, process.returncode) == (b"", 127)
    assert b"no-such-command-here" in err


async def test_the_shell_test(shell: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        shell / "sh", "-c", SHELL_TEST, stdin=DEVNULL, stdout=PIPE, env={"PATH": str(shell)}
    )
    out, _ = await process.communicate()
    assert out == SHELL_TEST_OUTPUT + b"\n"


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), min_size=1))
def test_the_command_can_be_read_back(argv: list[str]) -> None:
    words = shlex.split(wrap_killable(shlex.join(argv)))
    assert words[:3] == ["exec", "sh", "-c"]
    assert len(words) == 4
    inner = unwrap_killable(words[3])
    assert inner is not None
    assert shlex.split(inner) == argv


@pytest.mark.parametrize("script", ["", "nvidia-smi", "exec 3<&0; rm -rf x", os.linesep])
def test_other_scripts_are_not_unwrapped(script: str) -> None:
    assert unwrap_killable(script) is None
