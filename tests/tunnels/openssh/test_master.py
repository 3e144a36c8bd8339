"""The ``ssh`` child: its states, its echoes, its end."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpumesh.tunnels.openssh.master import OpensshMaster
from gpumesh.tunnels.transport import PING_RESEND_S
from tests.tunnels.openssh.connecting import connected
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import Sshd, needs_sshd

ANSWERS_THE_THIRD = """
import sys
lines = [sys.stdin.readline() for _ in range(3)]
sys.stdout.write(lines[2])
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.mark.slow
async def test_a_line_is_sent_again_while_no_echo_comes(tmp_path: Path) -> None:
    """A program in place of ``ssh``; the first two lines are lost on the way."""
    master = await OpensshMaster.start([sys.executable, "-c", ANSWERS_THE_THIRD], tmp_path / "control", None)
    try:
        waited_ms = await master.measure_round_trip_ms(30.0)
        assert waited_ms is not None
        assert waited_ms >= 2 * PING_RESEND_S * 900
        assert await master.measure_round_trip_ms(0.1) is None
    finally:
        await master.close()


pytestmark = [
    pytest.mark.real,
    needs_sshd,
    pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's ssh"),
]


async def test_a_closed_connection_leaves_no_process(sshd: Sshd, folder: Path) -> None:
    async with connected(sshd.spec(), folder) as (connection, _):
        master = connection._master.process.pid
    assert not alive(master)
    await wait_until(lambda: not sshd.children(), "sshd's session ended")


async def test_the_master_ends_when_its_process_is_killed(sshd: Sshd, tmp_path: Path, folder: Path) -> None:
    """In a process of its own, which is killed as hard as can be."""
    script = tmp_path / "holder.py"
    script.write_text(HOLDER)
    spec = sshd.spec()
    arguments = [str(sshd.port), spec.user, str(sshd.identity), str(sshd.known_hosts), str(folder)]
    python = [sys.executable, str(script), *arguments]
    with subprocess.Popen(python, stdout=subprocess.PIPE, cwd=os.getcwd()) as holder:
        assert holder.stdout is not None
        master = int(await asyncio.get_running_loop().run_in_executor(None, holder.stdout.readline))
        assert alive(master)
        holder.kill()
    await wait_until(lambda: not alive(master), "the master's end")
    await wait_until(lambda: not sshd.children(), "sshd's session ended")


HOLDER = """
import asyncio, sys
from pathlib import Path
from gpumesh.topology import SshSpec
from gpumesh.tunnels.transport import ConnectRequest
from gpumesh.tunnels.openssh.connection import connect

async def main():
    port, user, identity, known_hosts, folder = sys.argv[1:]
    ssh = SshSpec("127.0.0.1", int(port), user, (Path(identity),), Path(known_hosts), agent=False)
    connection = await connect(ConnectRequest("n", ssh, (), control_dir=folder), (), None)
    print(connection._master.process.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
