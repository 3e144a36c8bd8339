"""A Session that answers from a script, for the tests of the control socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

from gpumesh.backends.base import Chunk, ServerCounters
from gpumesh.config.comparison import ConfigSnapshot, KeyChange
from gpumesh.config.live_changes import ReloadReport
from gpumesh.daemon.sessions.session import PromptAnswer, PromptRequest
from gpumesh.errors import ExecError, ModelMissing, PoolDoesNotFit, QueueFull, UsageError
from gpumesh.mesh.history import History, HistorySeries
from gpumesh.mesh.outages.outage import Outage
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import ModelShape, PoolPhase, PoolPlan, PoolState
from gpumesh.state import MeshState
from gpumesh.tunnels.base import ExecChunk, OutputStream
from tests.cli.states import typical

SHAPE = ModelShape("llama", "tiny", "F16", (100, 100), 50, 50, (64, 64), 32, 256, 4, 2048, 1000, 320)


class ScriptedChat:
    def __init__(self, prompt: PromptRequest, ended: asyncio.Event) -> None:
        self.node: str | None = None
        self.attempts = 0
        self._prompt = prompt
        self._ended = ended

    async def __aiter__(self) -> AsyncGenerator[Chunk]:
        self.node, self.attempts = "iceland", 1
        try:
            for word in self._prompt.messages[-1].content.split():
                yield Chunk(text=word)
                if word == "hang":
                    await asyncio.Event().wait()
            self.attempts = 2
            yield Chunk(done=True, done_reason="stop", counters=ServerCounters(tokens=2, eval_ms=20.0))
        finally:
            self._ended.set()


class ScriptedSession:
    """``chat_ended`` and ``exec_ended`` are set when such a stream is closed, however that comes."""

    def __init__(self) -> None:
        self.state = typical()
        self.snapshot: ConfigSnapshot | None = None
        self.prompts: list[PromptRequest] = []
        self.reloads = 0
        self.drained: list[str] = []
        self.held: list[tuple[str, Outage]] = []
        self.hold_ended = asyncio.Event()
        self.reconnected: list[str] = []
        self.chat_ended = asyncio.Event()
        self.exec_ended = asyncio.Event()
        self.pool_states: tuple[PoolState, ...] = ()

    async def status(self) -> MeshState:
        return self.state

    async def wait_first_report(self, timeout_s: float) -> MeshState:
        return replace(self.state, mesh=f"after {timeout_s}")

    async def watch(self, interval_s: float) -> AsyncGenerator[MeshState]:
        for name in ("one", "two"):
            yield replace(self.state, mesh=name)
        await asyncio.Event().wait()

    def chat(self, prompt: PromptRequest) -> AbstractAsyncContextManager[PromptAnswer]:
        return self._open_chat(prompt)

    @asynccontextmanager
    async def _open_chat(self, prompt: PromptRequest) -> AsyncGenerator[PromptAnswer]:
        self.prompts.append(prompt)
        if prompt.model == "missing":
            raise ModelMissing("missing", available=("a", "b"), hint="pull it")
        if prompt.model == "full":
            raise QueueFull("too many wait", retry_after_s=3.0)
        if prompt.model == "bug":
            raise ZeroDivisionError("inside")
        yield ScriptedChat(prompt, self.chat_ended)

    async def exec(self, node: str, argv: Sequence[str]) -> AsyncGenerator[ExecChunk]:
        try:
            yield ExecChunk(OutputStream.STDOUT, " ".join(argv).encode() + b"\x00\xff\n")
            if argv[0] == "hang":
                await asyncio.Event().wait()
            yield ExecChunk(OutputStream.STDERR, b"", ended=True, exit_status=7)
        finally:
            self.exec_ended.set()

    async def drain(self, node: str) -> None:
        if node == "nobody":
            raise UsageError("there is no node 'nobody'", hint="the nodes are: iceland")
        self.drained.append(node)

    async def resume(self, node: str) -> None:
        self.drained.remove(node)

    @asynccontextmanager
    async def hold(self, node: str, outage: Outage) -> AsyncGenerator[None]:
        if node == "nobody":
            raise UsageError("there is no node 'nobody'", hint="the nodes are: iceland")
        self.held.append((node, outage))
        try:
            yield
        finally:
            self.held.remove((node, outage))
            self.hold_ended.set()
            if outage.start_command == "fail":
                raise ExecError("the server does not start")

    async def reconnect(self, node: str) -> None:
        self.reconnected.append(node)

    async def configuration(self) -> ConfigSnapshot | None:
        return self.snapshot

    async def reload(self) -> ReloadReport:
        self.reloads += 1
        return ReloadReport(after_restart=(KeyChange("gateway.listen", "127.0.0.1:1", "127.0.0.1:2"),))

    async def history(self) -> History:
        return History(
            gpus=(HistorySeries("GPU-1", (None, 12.5, 100.0)),), nodes=(HistorySeries("iceland", (0.0, 71.5)),)
        )

    async def plan_pool(self, spec: PoolSpec) -> PoolPlan:
        return PoolPlan(spec.name, spec.model, SHAPE, (), spec.context, spec.parallel, spec.kv_type, ("2 GiB too big",))

    async def start_pool(self, name: str) -> AsyncGenerator[PoolState]:
        if name == "small":
            raise PoolDoesNotFit("pool small does not fit: 2.0 GiB are missing", hint="less context")
        for phase in (PoolPhase.PLANNING, PoolPhase.LOADING, PoolPhase.READY):
            self.pool_states = (PoolState(name, "m", phase, starts=1),)
            yield self.pool_states[0]

    async def stop_pool(self, name: str) -> None:
        self.pool_states = (PoolState(name, "m", PoolPhase.STOPPED),)

    async def pools(self) -> tuple[PoolState, ...]:
        return self.pool_states
