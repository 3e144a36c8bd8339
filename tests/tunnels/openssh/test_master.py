"""The ``ssh`` child: its states, its echoes, its end."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.openssh.master import MasterState, OpensshMaster
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
    """A program in place of ``ssh``, which drops the first two lines."""
    control = tmp_path / "control"
    control.touch()
    master = await OpensshMaster.start([sys.executable, "-c", ANSWERS_THE_THIRD], control, None)
    try:
        assert repr(master).endswith(" STARTING>")
        assert await master.wait_logged_in(Deadline(30.0, time.monotonic), session=True)
        assert repr(master).endswith(" SILENT>")
        waited_ms = await master.measure_round_trip_ms(30.0)
        assert waited_ms is not None
        assert waited_ms >= 2 * PING_RESEND_S * 900
        assert master.state is MasterState.ECHOING
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
    """The connection is in another process, which is killed by SIGKILL."""
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


async def test_a_program_that_ends_before_the_login(tmp_path: Path) -> None:
    """The control socket never appears. A late event does not change the state any more."""
    master = await OpensshMaster.start([sys.executable, "-c", "pass"], tmp_path / "control", None)
    try:
        assert not await master.wait_logged_in(Deadline(30.0, time.monotonic), session=True)
        assert master.state is MasterState.EXITED
        assert master.exited
        master._advance(MasterState.ECHOING)
        assert repr(master) == f"<OpensshMaster pid {master.process.pid} EXITED>"
    finally:
        await master.close()
