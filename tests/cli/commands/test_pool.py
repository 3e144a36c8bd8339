"""`gpumesh pool`: by the installed command against a mesh that answers from a script, and in process without a mesh."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from gpumesh.daemon.control_socket.server import ControlServer
from gpumesh.daemon.mesh_lock import MeshLock
from gpumesh.daemon.paths import for_config
from gpumesh.errors import PoolFailed
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPhase, PoolPlan, PoolState
from tests.cli.in_process import invoke
from tests.cli.views.pool import samples
from tests.daemon.scripted import ScriptedSession
from tests.real.command import Gpumesh

MESH = """nodes:
- {name: vengeance, backend: {url: "http://127.0.0.1:9"}}
- {name: iceland, backend: {url: "http://127.0.0.1:9"}}
pools:
- {name: big, model: "llama3.3:70b", nodes: [vengeance, iceland]}
"""
SECOND = '- {name: small, model: "qwen2.5:7b", nodes: vengeance}\n'


class PoolSession(ScriptedSession):
    """``stopped`` has the pools that were stopped, also by the end of an unfinished start."""

    def __init__(self) -> None:
        super().__init__()
        self.pool_states = (PoolState("big", "llama3.3:70b", PoolPhase.STOPPED),)
        self.planned: list[PoolSpec] = []
        self.stopped: list[str] = []
        self.plan = samples.plan()
        self.hangs = False
        self.start_cut = asyncio.Event()
        self.error: PoolFailed | None = None

    async def plan_pool(self, spec: PoolSpec) -> PoolPlan:
        self.planned.append(spec)
        return self.plan

    async def start_pool(self, name: str) -> AsyncGenerator[PoolState]:
        try:
            for part in range(3):
                yield samples.state(PoolPhase.LOADING, loaded_bytes=part * samples.GIB, load_bytes=2 * samples.GIB)
            if self.error is not None:
                raise self.error
            if self.hangs:
                await asyncio.Event().wait()
            self.pool_states = (samples.state(PoolPhase.READY),)
            yield self.pool_states[0]
        except (GeneratorExit, asyncio.CancelledError):
            self.stopped.append(name)
            self.start_cut.set()
            raise

    async def stop_pool(self, name: str) -> None:
        self.stopped.append(name)
        self.pool_states = (PoolState("big", "llama3.3:70b", PoolPhase.STOPPED),)


@pytest.fixture
async def session(gpumesh: Gpumesh, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PoolSession]:
    """The session of a running mesh."""
    gpumesh.config.write_text(MESH)
    monkeypatch.setenv("XDG_RUNTIME_DIR", gpumesh.environment()["XDG_RUNTIME_DIR"])
    paths = for_config(gpumesh.config)
    lock = MeshLock.acquire(paths)
    scripted = PoolSession()
    try:
        async with ControlServer(scripted, paths.socket, on_stop=lambda _: None):
            yield scripted
    finally:
        lock.release()


async def test_up_shows_progress_and_says_when_it_is_ready(gpumesh: Gpumesh, session: PoolSession) -> None:
    ended = await gpumesh("pool", "up")
    assert ended.out == "big is ready: llama3.3:70b on vengeance and iceland\n"
    assert ended.err.splitlines() == [
        "big loads the model: 0 %, 0 MiB of 2.0 GiB",
        "big loads the model: 50 %, 1.0 of 2.0 GiB",
        "big loads the model: 100 %, 2.0 of 2.0 GiB",
        "big is ready",
        "`gpumesh run -m llama3.3:70b hello` asks it",
    ]
    again = await gpumesh("pool", "up", "big", "-q")
    assert again.out.startswith("big is ready already, for ")
    document = (await gpumesh("pool", "up", "--json")).json()
    assert (document["schema"], document["pools"][0]["phase"]) == ("gpumesh.pool/1", "ready")
    assert session.stopped == []


async def test_interrupting_the_start_stops_the_pool(gpumesh: Gpumesh, session: PoolSession) -> None:
    session.hangs = True
    async with gpumesh.terminal("pool", "up", columns=80) as seen:
        await seen.wait_for_text("2.0 of 2.0 GiB")
        seen.press("\x03")
        assert await seen.wait_exit() == 130
    assert "big is being stopped: " in seen.plain_text
    async with asyncio.timeout(10):
        await session.start_cut.wait()
    assert session.stopped == ["big"]


async def test_a_failed_start_is_an_error_with_its_reason(gpumesh: Gpumesh, session: PoolSession) -> None:
    session.error = PoolFailed("big has failed: no memory", hint="less context")
    ended = await gpumesh("pool", "up", "-q", code=1)
    assert (ended.out, ended.err) == ("", "error: big has failed: no memory\nhint: less context\n")


async def test_down_and_status(gpumesh: Gpumesh, session: PoolSession) -> None:
    assert (await gpumesh("pool", "down")).out == "big does not run\n"
    session.pool_states = (samples.state(PoolPhase.READY, tokens_per_s=10.8),)
    assert "● big  llama3.3:70b  ready for " in (await gpumesh("pool")).out
    assert (await gpumesh("pool", "status", "-o", "name")).out == "big\n"
    document = (await gpumesh("pool", "status", "big", "--json")).json()
    assert [(pool["name"], pool["tokens_per_s"]) for pool in document["pools"]] == [("big", 10.8)]
    assert (await gpumesh("pool", "down", "big")).out == "big is stopped\n"
    assert session.stopped == ["big"]
    assert "there is no pool 'bgi'" in (await gpumesh("pool", "status", "bgi", code=2)).err


async def test_plan_asks_the_running_mesh(gpumesh: Gpumesh, session: PoolSession) -> None:
    ended = await gpumesh("pool", "plan", "--context", "8192", "--nodes", "iceland=2GiB")
    assert ended.out.startswith("● big  llama3.3:70b  fits\n")
    (spec,) = session.planned
    assert (spec.context, [(member.node, member.memory_mib) for member in spec.members]) == (8192, [("iceland", 2048)])
    assert ended.err.splitlines()[-1].startswith("- { name: big, model: ")
    assert (await gpumesh("pool", "plan")).err.endswith("`gpumesh pool up big` starts it\n")

    session.pool_states = (samples.state(PoolPhase.READY),)
    ended = await gpumesh("pool", "plan")
    assert ended.err == "the pool big runs: what it holds on these nodes counts as memory of other programs\n"

    session.plan = samples.unfit_plan()
    ended = await gpumesh("pool", "plan", code=1)
    assert "does not fit" in ended.out.splitlines()[0]
    assert ended.err.splitlines()[-1] == "error: big does not fit: 7.0 GiB more are needed on iceland"
    document = (await gpumesh("pool", "plan", "--json", code=1)).json()
    assert (document["schema"], document["name"], document["fits"]) == ("gpumesh.pool/1", "big", False)
    assert len(document["problems"]) == 2


async def test_a_pool_that_the_running_mesh_does_not_know_yet(gpumesh: Gpumesh, session: PoolSession) -> None:
    from gpumesh import config
    from gpumesh.config.comparison import ConfigSnapshot

    session.snapshot = ConfigSnapshot(config.load(gpumesh.config))
    gpumesh.config.write_text(MESH + SECOND)
    ended = await gpumesh("pool", "up", "small", "-q", code=2)
    assert ended.err.splitlines() == [
        "error: the running mesh does not know the pool small yet: it is new in mesh.yaml",
        "hint: `gpumesh reload` lets it take the file over",
    ]


# -- without a mesh --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mesh.yaml of which no mesh runs."""
    config = tmp_path / "mesh.yaml"
    config.write_text(MESH)
    monkeypatch.setenv("GPUMESH_CONFIG", str(config))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o700)
    return config


@pytest.mark.usefixtures("no_mesh")
def test_without_a_mesh_up_says_how_to_start_one() -> None:
    assert invoke("pool", "up", code=1).err == (
        "error: no mesh is running for this configuration\nhint: `gpumesh up -d` starts it\n"
    )


def test_without_a_mesh_all_pools_are_stopped(no_mesh: Path) -> None:
    assert invoke("pool").out == "○ big  llama3.3:70b  stopped\n  → `gpumesh pool up big` starts it\n"
    assert json.loads(invoke("pool", "status", "--json").out)["pools"][0]["phase"] == "stopped"
    assert invoke("pool", "down").out == "big does not run\n"
    no_mesh.write_text(MESH + SECOND)
    assert [line.split()[:3] for line in invoke("pools").out.splitlines()[2:]] == [
        ["big", "○", "stopped"],
        ["small", "○", "stopped"],
    ]
    assert "several pools" in invoke("pool", "down", code=2).err
    no_mesh.write_text(MESH.partition("pools:")[0])
    assert invoke("pool", "status").out.startswith("mesh.yaml has no pools; ")
    assert json.loads(invoke("pool", "--json").out) == {"schema": "gpumesh.pool/1", "pools": []}


def test_without_a_mesh_a_plan_is_made_by_a_mesh_of_its_own(no_mesh: Path) -> None:
    no_mesh.write_text(MESH.replace("llama3.3:70b", "/nowhere/m.gguf"))
    ended = invoke("pool", "plan", code=1)
    assert "/nowhere/m.gguf" in ended.err
    assert "vengeance" in ended.err


@pytest.mark.usefixtures("no_mesh")
def test_options_before_the_command_are_refused() -> None:
    assert "belong behind the command: gpumesh pool status" in invoke("pool", "--json", "status", code=2).err


@pytest.mark.usefixtures("no_mesh")
def test_guesses_are_answered() -> None:
    assert invoke("pool", "ls").out == invoke("pool", "status").out
    assert "`gpumesh pool down NAME`" in invoke("pool", "restart", code=2).err


def test_names_of_pools_are_completed(no_mesh: Path) -> None:
    from types import SimpleNamespace

    from gpumesh.cli.completion import complete_pools

    no_mesh.write_text(MESH + SECOND)
    ctx = SimpleNamespace(meta={}, params={"config": no_mesh}, parent=None)
    assert complete_pools(ctx, "s") == ["small"]  # type: ignore[arg-type]
    assert complete_pools(ctx, "") == ["big", "small"]  # type: ignore[arg-type]
