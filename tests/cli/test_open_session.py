from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest
import typer

from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.open_session import open_session, run_async
from gpumesh.daemon.control_socket.remote_session import RemoteSession
from gpumesh.daemon.sessions.local_session import LocalSession
from gpumesh.errors import MeshNotRunning
from tests.cli.meshes import SimulatedMesh
from tests.real.command import Gpumesh
from tests.tunnels import polling

slow = pytest.mark.slow


@pytest.fixture
def clean_environment(gpumesh: Gpumesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process finds what the command finds."""
    for name in ("HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, gpumesh.environment()[name])
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("GPUMESH_CONFIG", raising=False)


def test_run_async_gives_the_result_and_exits_130_on_ctrl_c() -> None:
    async def good() -> int:
        return 5

    async def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    assert run_async(good()) == 5
    with pytest.raises(typer.Exit) as caught:
        run_async(interrupted())
    assert caught.value.exit_code == 130


EARLY = """
import signal, sys
from gpumesh.cli.open_session import run_async
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "gpumesh.daemon.process.async_runner":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
async def main(): ...
try:
    run_async(main())
except BaseException as error:
    print(type(error).__name__, error)
"""


def test_ctrl_c_before_the_coroutine_has_begun() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("Exit 130\n", "")


@slow
async def test_open_session_takes_the_running_mesh_or_embeds_one(
    direct: SimulatedMesh, clean_environment: None
) -> None:
    chosen = GlobalOptions(direct.gpumesh.config)
    with pytest.raises(MeshNotRunning, match="no mesh is running"):
        async with open_session(chosen, embed=False):
            pass
    async with open_session(chosen) as session:
        assert isinstance(session, LocalSession)
        assert len((await session.wait_first_report(20)).nodes) == 2
    await direct.gpumesh("up", "-d")
    for embed in (True, False):
        async with open_session(chosen, embed=embed) as session:
            assert isinstance(session, RemoteSession)
    pids = direct.gpumesh.processes()
    direct.gpumesh.kill_all()
    await polling.wait_until(lambda: not any(map(polling.alive, pids)), "the mesh is gone")
    async with open_session(chosen) as session:
        assert isinstance(session, LocalSession), "what a killed mesh left is no obstacle"
    assert direct.gpumesh.sockets() == []
