"""A session behind a socket, against servers that end, say nonsense, or are of another kind. (Against the real server:
test_control.)"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gpumesh.backends.base import Message
from gpumesh.config.comparison import ConfigSnapshot
from gpumesh.daemon.control_socket import framing, messages, quick_status
from gpumesh.daemon.control_socket.remote_session import RemoteSession
from gpumesh.daemon.control_socket.server import ControlServer
from gpumesh.daemon.sessions.session import PromptRequest
from gpumesh.errors import GPUMeshError, MeshNotRunning
from gpumesh.mesh.history import History
from gpumesh.pool_spec import PoolMember, PoolSpec
from gpumesh.pools.base import PoolPhase
from gpumesh.topology import BackendSpec, NodeSpec, Topology
from gpumesh.wire import to_json
from tests.daemon.scripted import ScriptedSession

ASK = PromptRequest((Message("user", "hello"),))


@asynccontextmanager
async def saying(path: Path, reply: bytes) -> AsyncIterator[RemoteSession]:
    """A server that says this to whatever it is asked, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(reply)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(serve, path)
    async with server, asyncio.timeout(20):
        yield RemoteSession(path)


async def test_history_and_reconnect(tmp_path: Path) -> None:
    session = ScriptedSession()
    async with ControlServer(session, tmp_path / "s", on_stop=lambda _: None), asyncio.timeout(20):
        remote = RemoteSession(tmp_path / "s")
        assert await remote.history() == await session.history()
        await remote.reconnect("iceland")
        assert (await remote.reload()).after_restart[0].key == "gateway.listen"
    assert session.reconnected == ["iceland"]
    assert session.reloads == 1


async def test_pools_are_planned_started_and_stopped(tmp_path: Path) -> None:
    async with (
        ControlServer(ScriptedSession(), tmp_path / "s", on_stop=lambda _: None),
        asyncio.timeout(20),
    ):
        remote = RemoteSession(tmp_path / "s")
        spec = PoolSpec("big", "m", (PoolMember("a"), PoolMember("b")), "a")
        assert (await remote.plan_pool(spec)).problems == ("2 GiB too big",)
        phases = [state.phase async for state in remote.start_pool("big")]
        assert phases == [PoolPhase.PLANNING, PoolPhase.LOADING, PoolPhase.READY]
        with pytest.raises(GPUMeshError, match=r"2\.0 GiB are missing") as caught:
            _ = [state async for state in remote.start_pool("small")]
        assert (caught.value.code, caught.value.hint) == ("pool-does-not-fit", "less context")
        await remote.stop_pool("big")
        assert [state.phase for state in await remote.pools()] == [PoolPhase.STOPPED]


async def test_a_mesh_of_an_older_version_has_no_pools(tmp_path: Path) -> None:
    unknown = messages.encode_message(messages.Error("usage", framing.UNKNOWN_MESSAGE, exit_code=2))
    async with saying(tmp_path / "s", unknown) as remote:
        with pytest.raises(GPUMeshError, match="older version, which has no pools"):
            await remote.pools()


async def test_what_the_mesh_has_read(tmp_path: Path) -> None:
    session = ScriptedSession()
    async with ControlServer(session, tmp_path / "s", on_stop=lambda _: None), asyncio.timeout(20):
        remote = RemoteSession(tmp_path / "s")
        assert await remote.configuration() is None
        session.snapshot = ConfigSnapshot(Topology("home", (NodeSpec("a", BackendSpec()),)), "abc")
        assert await remote.configuration() == session.snapshot
        document = await asyncio.to_thread(quick_status.fetch_configuration, tmp_path / "s")
        assert document == to_json(session.snapshot)


async def test_a_mesh_of_an_older_version_does_not_tell_what_it_has_read(tmp_path: Path) -> None:
    unknown = messages.encode_message(messages.Error("usage", "an unknown message", exit_code=2))
    async with saying(tmp_path / "s", unknown) as remote:
        assert await remote.configuration() is None
        assert await asyncio.to_thread(quick_status.fetch_configuration, tmp_path / "s") is None
    failed = messages.encode_message(messages.Error("failed", "a bug"))
    async with saying(tmp_path / "t", failed) as remote:
        with pytest.raises(GPUMeshError, match="a bug"):
            await remote.configuration()


async def test_a_mesh_that_ends_before_its_answer_does_is_an_error(tmp_path: Path) -> None:
    async with saying(tmp_path / "s", b"") as remote:
        with pytest.raises(GPUMeshError, match="ended in the middle") as caught:
            await remote.status()
        assert "`gpumesh logs` says why" in str(caught.value.hint)
        with pytest.raises(GPUMeshError, match="ended in the middle"):
            _ = [state async for state in remote.watch(1.0)]
        async with remote.chat(ASK) as stream:
            with pytest.raises(GPUMeshError, match="ended in the middle"):
                _ = [chunk async for chunk in stream]
        assert [state async for state in remote.down(1.0)] == [], "that is what was asked for"


@pytest.mark.parametrize(
    "reply", [b"nonsense\n", b"{}\n", b'{"kind": "Dance"}\n', b'{"kind": "State", "state": 5}\n', b"[" * 9999 + b"\n"]
)
async def test_an_unreadable_reply_is_an_error(tmp_path: Path, reply: bytes) -> None:
    async with saying(tmp_path / "s", reply) as remote:
        with pytest.raises(GPUMeshError, match="cannot read"):
            await remote.status()


@pytest.mark.parametrize(
    "output", [messages.Output("stdout", "not base64!"), messages.Output("stdout", "ü"), messages.Output("stdwhat", "")]
)
async def test_output_that_cannot_be_decoded_is_an_error(tmp_path: Path, output: messages.Output) -> None:
    async with saying(tmp_path / "s", messages.encode_message(output)) as remote:
        with pytest.raises(GPUMeshError, match="cannot read"):
            _ = [chunk async for chunk in remote.exec("n", ("true",))]


async def test_an_end_without_a_state_is_an_error(tmp_path: Path) -> None:
    async with saying(tmp_path / "s", messages.encode_message(messages.End())) as remote:
        with pytest.raises(GPUMeshError, match="without telling its state"):
            await remote.status()
        assert await remote.history() == History()


async def test_nobody_is_there(tmp_path: Path) -> None:
    remote = RemoteSession(tmp_path / "nothing")
    for asking in (remote.status(), remote.history(), remote.drain("n"), remote.reconnect("n")):
        with pytest.raises(MeshNotRunning):
            await asking
    (tmp_path / "file").touch()
    with pytest.raises(GPUMeshError, match=r"."):
        await RemoteSession(tmp_path / "file").status()


async def test_a_path_too_long_for_a_socket_means_that_no_mesh_runs(tmp_path: Path) -> None:
    with pytest.raises(MeshNotRunning):
        await RemoteSession(tmp_path / ("x" * 120) / "control.sock").status()
