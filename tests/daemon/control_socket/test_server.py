from __future__ import annotations

import asyncio
import json
import socket
import stat
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest

from gpumesh.backends.base import Message
from gpumesh.daemon.control_socket import messages
from gpumesh.daemon.control_socket.quick_status import fetch_status
from gpumesh.daemon.control_socket.remote_session import RemoteSession
from gpumesh.daemon.control_socket.server import ControlServer
from gpumesh.daemon.sessions.session import PromptRequest
from gpumesh.errors import ExitCode, GPUMeshError, MeshNotRunning, ModelMissing, QueueFull
from gpumesh.mesh.outages.outage import Outage, OutageKind
from gpumesh.state import MeshState
from gpumesh.tunnels.base import OutputStream
from gpumesh.wire import from_json
from tests.daemon.scripted import ScriptedSession


class Running:
    """A control server over a scripted session, and a client of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.session = ScriptedSession()
        self.stopped = asyncio.Event()
        self.drain_s = 0.0
        self.server = ControlServer(self.session, path, on_stop=self._stop)
        self.remote = RemoteSession(path)

    def _stop(self, drain_s: float) -> None:
        self.drain_s = drain_s
        self.stopped.set()


@pytest.fixture
async def running(tmp_path: Path) -> AsyncGenerator[Running]:
    made = Running(tmp_path / "control.sock")
    async with made.server, asyncio.timeout(20):
        yield made


def make_prompt(text: str, model: str | None = None) -> PromptRequest:
    return PromptRequest((Message("user", text),), model=model, options={"temperature": 0.5}, think=False)


async def test_the_socket_is_private_and_removed_with_the_server(tmp_path: Path) -> None:
    made = Running(tmp_path / "control.sock")
    async with made.server:
        assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
    assert not made.path.exists()


async def test_status_survives_the_socket_unchanged(running: Running) -> None:
    assert await running.remote.status() == running.session.state
    assert (await running.remote.wait_first_report(1.5)).mesh == "after 1.5"


async def test_quick_status_reads_the_real_server(running: Running) -> None:
    seen = await asyncio.to_thread(fetch_status, running.path)
    assert seen is not None
    assert from_json(MeshState, seen) == running.session.state


async def test_watching_goes_on_until_the_client_closes(running: Running) -> None:
    async with aclosing(running.remote.watch(0.0)) as states:
        assert [(await anext(states)).mesh, (await anext(states)).mesh] == ["one", "two"]


async def test_a_chat_streams_chunks_node_and_attempts(running: Running) -> None:
    async with running.remote.chat(make_prompt("hello there")) as stream:
        chunks = [chunk async for chunk in stream]
    assert [chunk.text for chunk in chunks] == ["hello", "there", ""]
    assert chunks[-1].counters is not None
    assert chunks[-1].counters.tokens_per_s == 100.0
    assert (stream.node, stream.attempts) == ("iceland", 2)
    assert running.session.prompts == [make_prompt("hello there")]


async def test_leaving_a_chat_cancels_it_in_the_mesh(running: Running) -> None:
    async with running.remote.chat(make_prompt("hang on")) as stream:
        assert (await anext(aiter(stream))).text == "hang"
    await running.session.chat_ended.wait()


async def test_a_killed_client_cancels_its_chat(running: Running) -> None:
    _, writer = await asyncio.open_unix_connection(running.path)
    writer.write(messages.encode_message(messages.Chat(make_prompt("hang on"))))
    await writer.drain()
    while not running.session.prompts:
        await asyncio.sleep(0)
    writer.transport.abort()
    await running.session.chat_ended.wait()


async def test_exec_carries_any_bytes_and_the_exit_status(running: Running) -> None:
    chunks = [chunk async for chunk in running.remote.exec("iceland", ["echo", "x"])]
    assert chunks[0].data == b"echo x\x00\xff\n"
    assert chunks[-1].stream is OutputStream.STDERR
    assert (chunks[-1].ended, chunks[-1].exit_status) == (True, 7)


async def test_closing_an_exec_ends_the_command(running: Running) -> None:
    async with aclosing(running.remote.exec("iceland", ["hang"])) as chunks:
        await anext(chunks)
    await running.session.exec_ended.wait()


async def test_drain_and_resume(running: Running) -> None:
    await running.remote.drain("iceland")
    assert running.session.drained == ["iceland"]
    await running.remote.resume("iceland")
    assert running.session.drained == []


DRAIN = Outage(OutageKind.DRAIN)


async def test_a_node_is_held_until_the_block_ends(running: Running) -> None:
    async with running.remote.hold("iceland", DRAIN):
        assert running.session.held == [("iceland", DRAIN)]
    assert running.session.held == [], "the node is back when the block has ended"


async def test_a_killed_client_holds_no_node(running: Running) -> None:
    reader, writer = await asyncio.open_unix_connection(running.path)
    writer.write(messages.encode_message(messages.Hold("iceland", DRAIN)))
    assert messages.decode_reply(await reader.readline()) == messages.Held()
    writer.transport.abort()
    await running.session.hold_ended.wait()
    assert running.session.held == []


async def test_a_block_that_fails_holds_no_node(running: Running) -> None:
    with pytest.raises(ZeroDivisionError):
        async with running.remote.hold("iceland", DRAIN):
            raise ZeroDivisionError
    await running.session.hold_ended.wait()
    assert running.session.held == []


async def test_a_node_that_cannot_be_held_or_put_back_is_an_error(running: Running) -> None:
    with pytest.raises(GPUMeshError, match="no node 'nobody'"):
        async with running.remote.hold("nobody", DRAIN):
            pass
    with pytest.raises(GPUMeshError, match="the server does not start"):
        async with running.remote.hold("iceland", Outage(OutageKind.SERVER, "stop", "fail")):
            pass


async def test_a_mesh_that_closes_puts_the_node_back(tmp_path: Path) -> None:
    made = Running(tmp_path / "control.sock")
    async with asyncio.timeout(20):
        async with made.server:
            reader, writer = await asyncio.open_unix_connection(made.path)
            writer.write(messages.encode_message(messages.Hold("iceland", DRAIN)))
            await reader.readline()
            assert made.session.held
        assert made.session.held == []
    writer.close()


async def test_errors_keep_their_code_hint_and_exit_code(running: Running) -> None:
    with pytest.raises(GPUMeshError) as caught:
        await running.remote.drain("nobody")
    assert caught.value.code == "usage"
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.hint == "the nodes are: iceland"


async def test_errors_that_callers_handle_keep_their_type(running: Running) -> None:
    with pytest.raises(ModelMissing) as missing:
        async with running.remote.chat(make_prompt("x", "missing")) as stream:
            await anext(aiter(stream))
    assert missing.value.available == ("a", "b")
    assert missing.value.hint == "pull it"
    with pytest.raises(QueueFull) as full:
        async with running.remote.chat(make_prompt("x", "full")) as stream:
            await anext(aiter(stream))
    assert full.value.retry_after_s == 3.0


async def test_a_bug_in_one_request_is_reported_and_ends_nothing_else(running: Running) -> None:
    with pytest.raises(GPUMeshError, match="ZeroDivisionError"):
        async with running.remote.chat(make_prompt("x", "bug")) as stream:
            await anext(aiter(stream))
    assert (await running.remote.status()).mesh == "home"


async def test_down_says_how_long_draining_may_take_and_ends_with_the_socket(tmp_path: Path) -> None:
    made = Running(tmp_path / "control.sock")
    seen = []
    async with asyncio.timeout(20), aclosing(made.remote.down(2.5)) as states:
        async with made.server:
            async for state in states:
                seen.append(state.mesh)
                if len(seen) == 2:
                    break
            assert made.drain_s == 2.5
        assert [state async for state in states] == []


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"not json\n",
        b"[]\n",
        b'{"kind": "Nothing"}\n',
        b'{"kind": ["Chat"]}\n',
        b'{"kind": "Chat"}\n',
        b'{"kind": "Chat", "ask": 3}\n',
        b'{"kind": "Watch", "interval_s": "often"}\n',
        b"[" * 5000 + b"\n",
        b"\xff\xfe\n",
    ],
)
async def test_an_unreadable_request_is_answered_with_an_error(running: Running, line: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(running.path)
    writer.write(line)
    answer = json.loads(await reader.readline())
    assert answer["kind"] == "Error"
    assert answer["exit_code"] == 2
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_a_silent_connection_does_not_delay_closing(tmp_path: Path) -> None:
    made = Running(tmp_path / "control.sock")
    async with asyncio.timeout(20):
        async with made.server:
            reader, writer = await asyncio.open_unix_connection(made.path)
            await made.remote.status()
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_nobody_listens(tmp_path: Path) -> None:
    missing = tmp_path / "control.sock"
    assert fetch_status(missing) is None
    with pytest.raises(MeshNotRunning):
        await RemoteSession(missing).status()


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    made = Running(tmp_path / "control.sock")
    made.path.write_text("left behind")
    async with made.server:
        assert (await made.remote.status()).mesh == "home"


async def test_a_silent_connection_is_closed_after_the_timeout(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with (
        ControlServer(ScriptedSession(), path, on_stop=lambda _: None, request_timeout_s=0.05),
        asyncio.timeout(20),
    ):
        reader, writer = await asyncio.open_unix_connection(path)
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_hundreds_of_concurrent_connections(running: Running) -> None:
    def connect() -> list[socket.socket]:
        made = [socket.socket(socket.AF_UNIX) for _ in range(400)]
        for one in made:
            one.setblocking(False)  # refused where a blocking one would wait
            one.connect(str(running.path))
        return made

    silent = connect()  # nobody accepts meanwhile: the loop is here
    try:
        assert await running.remote.status() == running.session.state
    finally:
        for one in silent:
            one.close()


@pytest.mark.parametrize("taken", ["removed", "a file", "a link"])
async def test_a_removed_socket_is_restored(running: Running, taken: str) -> None:
    async with aclosing(running.remote.watch(0.01)) as watching:
        await anext(watching)
        running.path.unlink()
        if taken == "a file":
            running.path.write_text("x")
        elif taken == "a link":
            running.path.symlink_to("/dev/null")
        with pytest.raises(MeshNotRunning):
            await running.remote.status()
        await running.server.restore_socket()
        assert await running.remote.status() == running.session.state
        assert stat.S_IMODE(running.path.stat().st_mode) == 0o600
        await anext(watching)  # an open connection goes on


async def test_an_existing_socket_is_not_replaced(running: Running) -> None:
    before = running.path.stat().st_ino
    await running.server.restore_socket()
    assert running.path.stat().st_ino == before


async def test_reprs_show_the_state(tmp_path: Path) -> None:
    made = Running(tmp_path / "s")
    assert repr(made.server) == f"<ControlServer {made.path} CLOSED 0 connections>"
    async with made.server:
        assert repr(made.server) == f"<ControlServer {made.path} LISTENING 0 connections>"
    assert repr(made.server) == f"<ControlServer {made.path} CLOSED 0 connections>"
    assert repr(made.remote) == f"<RemoteSession {made.path}>"
