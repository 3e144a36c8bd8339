"""Commands on the host by clients of the master, against a real OpenSSH sshd."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from gpumesh.errors import ExecError
from tests.tunnels.openssh.connecting import connected, run_command
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import Sshd, needs_sshd

pytestmark = [
    pytest.mark.real,
    needs_sshd,
    pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's ssh"),
]


async def test_commands(sshd: Sshd, folder: Path) -> None:
    async with connected(sshd.spec(), folder) as (connection, _):
        result = await run_command(connection, shlex.join(["sh", "-c", "echo 'a b'; echo err >&2; exit 7"]))
        assert result == (b"a b\n", b"err\n", 7)
        output, _, status = await run_command(connection, "head -c 3000000 /dev/zero")
        assert (len(output), status) == (3_000_000, 0)
        assert (await run_command(connection, "no-such-command"))[2] == 127
        assert (await run_command(connection, "cat"))[2] == 0  # its input is empty


async def test_killing_a_command_ends_it_on_the_host(sshd: Sshd, folder: Path) -> None:
    async with connected(sshd.spec(), folder) as (connection, _):
        running = await connection.start_command("sh -c 'echo $$; sleep 600; true'")
        piece = await running.read()
        assert piece is not None
        pid = int(piece[1])
        assert alive(pid)
        await running.kill()
        await wait_until(lambda: not alive(pid), "the command's end")
        await running.kill()
        assert await connection.ping(10.0) is not None


async def test_a_command_that_lost_its_connection_has_no_exit_status(sshd: Sshd, folder: Path) -> None:
    """ssh then has exit status 255, which a command may have as well."""
    async with connected(sshd.spec(), folder) as (connection, _):
        assert (await run_command(connection, "sh -c 'exit 255'"))[2] == 255
        cut_off = asyncio.create_task(run_command(connection, "sleep 600"))
        before = set(sshd.children())
        await wait_until(lambda: len(set(sshd.children()) - before) > 0, "the command at the host")
        os.kill(sshd.children()[0], signal.SIGKILL)
        with pytest.raises(ExecError, match="broke"):
            await cut_off


async def test_no_session_left_for_a_command(tmp_path: Path, folder: Path) -> None:
    async with Sshd(tmp_path / "few", {"MaxSessions": "1"}) as sshd, connected(sshd.spec(), folder) as (made, _):
        with pytest.raises(ExecError, match="session"):
            await run_command(made, "true")
        assert await made.ping(10.0) is not None
