"""A mesh over the two hosts of a pool, in the background as a person has it, with its commands and its gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gpumesh.daemon.control_socket.remote_session import RemoteSession
from gpumesh.pools.base import PoolPhase, PoolState
from gpumesh.state import TunnelPhase
from tests.http_clients import loopback_client
from tests.real.command import Gpumesh
from tests.real.pools.pool_hosts import HEAD_PROGRAM, WORKER_PROGRAM, PoolHost
from tests.tunnels.polling import DEADLINE_S
from tests.tunnels.sshd import run_agent

if TYPE_CHECKING:  # its import takes a second
    import openai

# Another one in each process of the tests: a pool's llama-server has the same port at each start, by the pool's name,
# and all hosts of all tests share this machine's ports.
POOL = f"duo-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
HEAD, WORKER = "alpha", "beta"


def pool_entry(model: Path | str, **changes: Any) -> dict[str, Any]:
    """A pool in mesh.yaml. The split is given, because a plan would leave a small model on the head alone."""
    members = [{"node": name, "memory": "256MiB"} for name in (HEAD, WORKER)]
    entry = {"name": POOL, "model": str(model), "nodes": members, "head": HEAD, "context": 2048, "split": [4, 4]}
    return {name: value for name, value in {**entry, **changes}.items() if value is not None}


@dataclass
class PoolMesh:
    """``url`` is the gateway's, while the mesh is up."""

    gpumesh: Gpumesh
    head: PoolHost
    worker: PoolHost
    extra_nodes: Sequence[Mapping[str, Any]] = ()
    pools: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    @property
    def hosts(self) -> tuple[PoolHost, PoolHost]:
        return self.head, self.worker

    def write_config(self) -> None:
        nodes = [*(host.node() for host in self.hosts), *self.extra_nodes]
        gateway = {"listen": "127.0.0.1:0"}
        config = {"version": 1, "name": "real", "gateway": gateway, "nodes": nodes, "pools": self.pools}
        self.gpumesh.config.write_text(json.dumps(config, indent=1))

    async def start(self) -> None:
        self.write_config()
        await self.gpumesh("up", "-d", code=None)  # the nodes have no server of their own: this is an error code
        async with asyncio.timeout(DEADLINE_S):
            while True:
                state = await self.session.status()
                phases = {node.tunnel.state for node in state.nodes if node.name in (HEAD, WORKER) and node.tunnel}
                if phases == {TunnelPhase.UP}:
                    break
                await asyncio.sleep(0.1)
        assert state.gateway.url is not None
        self.url = state.gateway.url

    @property
    def session(self) -> RemoteSession:
        """The running mesh without a command: a test that polls would otherwise need more CPU time than the pool."""
        sockets = self.gpumesh.runtime.rglob("control.sock")
        return RemoteSession(max(sockets, key=lambda path: path.stat().st_mtime))

    # -- pools -------------------------------------------------------------------------------------------------------

    async def shown_state(self, pool: str = POOL) -> dict[str, Any]:
        """What `pool status --json` says of a pool."""
        (state,) = (await self.gpumesh("pool", "status", pool, "--json")).json()["pools"]
        return dict(state)

    async def state(self, pool: str = POOL) -> PoolState:
        (state,) = [state for state in await self.session.pools() if state.pool == pool]
        return state

    async def wait_phase(self, *phases: PoolPhase, pool: str = POOL, starts: int = 0) -> PoolState:
        """Waits until a pool is in one of these phases, and was started ``starts`` times at least; its state then."""
        state: PoolState | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEADLINE_S):
                while (state := await self.state(pool)).phase not in phases or state.starts < starts:
                    await asyncio.sleep(0.1)
                return state
        raise AssertionError(f"not {phases} with {starts} starts: {state}\n{self.gpumesh.logs()}")

    async def make_ready(self, pool: str = POOL) -> PoolState:
        """Starts a pool if it does not run."""
        await self.gpumesh("pool", "up", pool)
        return await self.wait_phase(PoolPhase.READY, pool=pool)

    async def make_stopped(self, pool: str = POOL) -> None:
        await self.gpumesh("pool", "down", pool)
        await self.wait_phase(PoolPhase.STOPPED, pool=pool)
        await self.wait_hosts_empty("after `pool down`")

    async def wait_hosts_empty(self, why: str) -> None:
        for host in self.hosts:
            await host.wait_empty(why)

    def programs(self) -> dict[str, int]:
        """How many of each of llama.cpp's programs run on both hosts."""
        return dict(Counter(f"{host.name} {program}" for host in self.hosts for program in host.running().values()))

    # -- the gateway -------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[openai.AsyncOpenAI]:
        import openai

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NO_PROXY", "127.0.0.1")  # of the machine that the tests run on
            async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0) as made:
                yield made

    async def answers(self, model: str) -> bool:
        """Whether a short question is answered now."""
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        async with loopback_client(timeout=20) as http:
            return (await http.post(f"{self.url}/v1/chat/completions", json=body)).status_code == 200

    async def wait_answer(self, model: str) -> None:
        """Asks until there is an answer."""
        async with asyncio.timeout(DEADLINE_S):
            while not await self.answers(model):
                await asyncio.sleep(0.1)


#: Only one pool of each program runs on a host.
ONE_POOL = {f"{HEAD} {HEAD_PROGRAM}": 1, f"{WORKER} {WORKER_PROGRAM}": 1}


@contextlib.asynccontextmanager
async def pool_mesh(
    folder: Path,
    pools: Sequence[dict[str, Any]],
    *,
    extra_nodes: Sequence[Mapping[str, Any]] = (),
    head_may_log_in: bool = False,
) -> AsyncIterator[PoolMesh]:
    """A running mesh with both hosts and these pools, none of which is started. Nothing may be left at the end.

    ``head_may_log_in``: the head's host has an SSH agent with a key for the worker's."""
    home = folder / "home"
    home.mkdir(parents=True)
    runtime = Path(tempfile.mkdtemp(prefix="gm-", dir="/tmp"))  # short: it holds Unix sockets
    command = Gpumesh(folder / "mesh.yaml", home, runtime, warm=True)
    try:
        async with contextlib.AsyncExitStack() as stack:
            worker = await stack.enter_async_context(PoolHost(WORKER, folder / WORKER))
            variables = {}
            if head_may_log_in:
                variables["SSH_AUTH_SOCK"] = str(stack.enter_context(run_agent(runtime, worker.sshd.identity)))
            head = await stack.enter_async_context(PoolHost(HEAD, folder / HEAD, variables))
            mesh = PoolMesh(command, head, worker, extra_nodes, list(pools))
            await mesh.start()
            yield mesh
            await command("down", code=None)
            await mesh.wait_hosts_empty("after `down`")
        assert not command.processes(), f"processes were left: {command.processes()}"
    finally:
        command.kill_all()
        shutil.rmtree(runtime, ignore_errors=True)


def link_model(model: Path, folder: Path, name: str) -> Path:
    """The same model by another name, so that a test has it for itself."""
    path = folder / f"{name}.gguf"
    os.link(model, path)
    return path
