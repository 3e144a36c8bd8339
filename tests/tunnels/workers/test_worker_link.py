"""The supervisor's side of a connection; the test plays the worker over a real socket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from gpumesh.errors import ExecError, TunnelDown
from gpumesh.topology import Target
from gpumesh.tunnels.base import ExecChunk, OutputStream, Prompter
from gpumesh.tunnels.lifecycle import Cause
from gpumesh.tunnels.transport import ConnectionInfo
from gpumesh.tunnels.workers import protocol, worker_link
from gpumesh.tunnels.workers.protocol import (
    Close,
    Done,
    Failed,
    ForwardFailed,
    FromWorker,
    Input,
    Kill,
    Lost,
    OutputPiece,
    PeerRefused,
    Ping,
    Pong,
    Prompt,
    Reply,
    StartCommand,
    ToWorker,
)
from gpumesh.tunnels.workers.worker_link import WorkerLink, cause_from_error, error_from_cause
from gpumesh.tunnels.workers.worker_pool import LINE_LIMIT, WorkerHandle, WorkerPool
from tests.tunnels.polling import wait_until


@dataclass
class LinkWithWorker:
    """``link``, and the worker's part: ``receive`` and ``send``."""

    link: WorkerLink
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    connected: list[ConnectionInfo] = field(default_factory=list)
    refused: list[ForwardFailed] = field(default_factory=list)
    peers: list[PeerRefused] = field(default_factory=list)

    async def receive(self) -> ToWorker | FromWorker:
        return protocol.decode_message(await asyncio.wait_for(self.reader.readline(), 20))

    def send(self, *messages: FromWorker) -> None:
        for message in messages:
            self.writer.write(protocol.encode_message(message))

    def send_output(self, number: int, stream: OutputStream, data: bytes) -> None:
        self.send(OutputPiece(number, stream.value, base64.b64encode(data).decode()))


@contextlib.asynccontextmanager
async def running_link(ask: Prompter | None = None) -> AsyncIterator[LinkWithWorker]:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LINE_LIMIT)
    far_reader, far_writer = await asyncio.open_unix_connection(sock=theirs, limit=LINE_LIMIT)
    connected: list[ConnectionInfo] = []
    refused: list[ForwardFailed] = []
    peers: list[PeerRefused] = []
    async with WorkerHandle("iceland", 0, reader, writer, WorkerPool()) as handle:
        link = WorkerLink(
            "iceland",
            handle,
            prompter=ask,
            on_connected=connected.append,
            on_forward_failed=refused.append,
            on_peer_refused=peers.append,
        )
        try:
            async with asyncio.TaskGroup() as group:
                listening = group.create_task(link.receive_messages(group))
                yield LinkWithWorker(link, far_reader, far_writer, connected, refused, peers)
                listening.cancel()
        finally:
            far_writer.close()


async def wait_end_cause(pair: LinkWithWorker) -> Cause:
    return await asyncio.wait_for(asyncio.shield(pair.link.end_cause), 20)


# -- how it ends -----------------------------------------------------------------------------------------------------


async def test_up_and_what_ends_it() -> None:
    async with running_link() as pair:
        assert not pair.link.connected.is_set()
        assert repr(pair.link) == "<WorkerLink iceland CONNECTING 0 commands>"
        pair.send(ConnectionInfo(1.5, "SSH-2.0-x", "aes"))
        await asyncio.wait_for(pair.link.connected.wait(), 20)
        assert pair.connected == [ConnectionInfo(1.5, "SSH-2.0-x", "aes")]
        assert repr(pair.link) == "<WorkerLink iceland UP 0 commands>"
        pair.send(Lost("tunnel-lost", "the connection broke", "a hint"), Lost("tunnel", "and more"))
        assert await wait_end_cause(pair) == Cause("tunnel-lost", "the connection broke", "a hint")


@pytest.mark.parametrize(("code", "needs_person"), [("auth-refused", True), ("connect-refused", False), ("new", False)])
async def test_the_error_code_decides_whether_a_person_must_act(code: str, needs_person: bool) -> None:
    async with running_link() as pair:
        pair.send(Failed(code, "why", "hint"))
        cause = await wait_end_cause(pair)
        assert (cause.message, cause.hint, cause.needs_person) == ("why", "hint", needs_person)
        error = error_from_cause(cause, "iceland")
        assert (error.message, error.hint, error.node) == ("why", "hint", "iceland")
        assert cause_from_error(error).needs_person is needs_person


@pytest.mark.parametrize("line", [b"", b"{}\n", b"\xff\n", b'{"kind": "Up"}\n', b'{"kind": "Po'])
async def test_a_worker_that_ends_or_sends_nonsense_loses_the_tunnel(line: bytes) -> None:
    async with running_link() as pair:
        pair.writer.write(line)
        pair.writer.close()
        cause = await wait_end_cause(pair)
        assert cause.code == "tunnel-lost"
        assert "iceland" in cause.message
        assert not cause.needs_person


async def test_refused_forwards_are_reported() -> None:
    refused = ForwardFailed(Target("127.0.0.1", 80), "backend-unreachable", "nothing answers")
    async with running_link() as pair:
        pair.send(refused)
        await wait_until(lambda: pair.refused == [refused], "the refusal")


async def test_refused_users_are_reported() -> None:
    other = PeerRefused(40123, 1001, "bob")
    async with running_link() as pair:
        pair.send(other)
        await wait_until(lambda: pair.peers == [other], "the refusal")


# -- pings -----------------------------------------------------------------------------------------------------------


async def test_each_ping_gets_its_own_answer() -> None:
    async with running_link() as pair:
        pings = [asyncio.create_task(pair.link.ping(20.0)) for _ in range(3)]
        received = [await pair.receive() for _ in pings]
        assert all(isinstance(ping, Ping) for ping in received)
        for ping in reversed(received):
            assert isinstance(ping, Ping)
            pair.send(Pong(ping.id, float(ping.id)), Pong(ping.id, 99.0), Pong(12345, 1.0))
        assert await asyncio.gather(*pings) == [float(ping.id) for ping in received if isinstance(ping, Ping)]


async def test_a_ping_without_an_answer_is_none() -> None:
    async with running_link() as pair:
        assert await pair.link.ping(0.01) is None  # the worker itself does not answer
        pinging = asyncio.create_task(pair.link.ping(20.0))
        while not isinstance(ping := await pair.receive(), Ping) or ping.timeout_s < 1:
            pass
        pair.send(Pong(ping.id, None))  # the host does not answer
        assert await pinging is None
        waiting = asyncio.create_task(pair.link.ping(20.0))
        await pair.receive()
        pair.link.finish(Cause("tunnel-lost", "it is over"))
        assert await waiting is None
    assert await pair.link.ping(5.0) is None  # the worker is gone


# -- questions -------------------------------------------------------------------------------------------------------


async def test_a_question_to_a_person_delays_no_other_message() -> None:
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    received: list[tuple[str, str, bool]] = []

    async def ask(node: str, text: str, *, echo: bool) -> str | None:
        received.append((node, text, echo))
        return await answer

    async with running_link(ask) as pair:
        pair.send(Prompt(7, "Code: ", True))
        await wait_until(lambda: bool(received), "the question")
        assert pair.link.open_prompts == 1
        pair.send(ConnectionInfo(None, "x"))
        await asyncio.wait_for(pair.link.connected.wait(), 20)
        answer.set_result("123")
        assert await pair.receive() == Reply(7, "123")
        assert received == [("iceland", "Code: ", True)]
        await wait_until(lambda: pair.link.open_prompts == 0, "the end of the question")


async def test_without_a_prompter_the_answer_is_none() -> None:
    async with running_link() as pair:
        pair.send(Prompt(7, "Code: ", False))
        assert await pair.receive() == Reply(7, None)


# -- commands --------------------------------------------------------------------------------------------------------


async def test_a_command_and_its_output() -> None:
    async with running_link() as pair:
        running = asyncio.create_task(pair.link.run_command("nvidia-smi -L", timeout_s=20.0, limit_bytes=100))
        request = await pair.receive()
        assert isinstance(request, StartCommand)
        assert (request.command, request.timeout_s, request.limit_bytes, request.stream) == (
            "nvidia-smi -L",
            20.0,
            100,
            False,
        )
        pair.send_output(request.id, OutputStream.STDOUT, b"GPU ")
        pair.send_output(request.id, OutputStream.STDERR, b"\xff")
        pair.send_output(request.id, OutputStream.STDOUT, b"0")
        pair.send_output(999, OutputStream.STDOUT, b"of no command")
        pair.send(Done(request.id, 3, truncated=True))
        result = await running
        assert (result.exit_status, result.stdout, result.stderr, result.truncated) == (3, b"GPU 0", b"\xff", True)


@pytest.mark.parametrize("how", ["error", "cut", "ended before"])
async def test_a_command_that_fails(how: str) -> None:
    async with running_link() as pair:
        if how == "ended before":
            pair.link.finish(Cause("tunnel-lost", "the line is down"))
            with pytest.raises(TunnelDown, match="iceland"):
                await pair.link.run_command("true", timeout_s=5.0, limit_bytes=10)
            return
        running = asyncio.create_task(pair.link.run_command("true", timeout_s=20.0, limit_bytes=10))
        request = await pair.receive()
        assert isinstance(request, StartCommand)
        if how == "error":
            pair.send(Done(request.id, None, error="the host gives no session"))
        else:
            pair.link.finish(Cause("tunnel-lost", "the line is down"))
        with pytest.raises(ExecError, match="no session" if how == "error" else "the line is down") as caught:
            await running
        assert caught.value.node == "iceland"


async def test_a_worker_that_does_not_keep_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "DEADLINE_SLACK_S", 0.05)
    async with running_link() as pair:
        with pytest.raises(ExecError, match=r"within 0\.05 s"):
            await pair.link.run_command("sleep 600", timeout_s=0.05, limit_bytes=10)
        request = await pair.receive()
        assert isinstance(request, StartCommand)
        assert await pair.receive() == Kill(request.id)
        pair.send(Done(request.id, None, error="late"))  # its caller is gone
        assert not pair.link._commands


async def test_a_cancelled_command_is_killed() -> None:
    async with running_link() as pair:
        running = asyncio.create_task(pair.link.run_command("sleep 600", timeout_s=60.0, limit_bytes=10))
        request = await pair.receive()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert isinstance(request, StartCommand)
        assert await pair.receive() == Kill(request.id)


async def test_output_beyond_the_limit_fails_the_command() -> None:
    """A worker that does not keep to ``limit_bytes``: it may be what a hostile host has taken over."""
    async with running_link() as pair:
        running = asyncio.create_task(pair.link.run_command("yes", timeout_s=60.0, limit_bytes=1000))
        request = await pair.receive()
        assert isinstance(request, StartCommand)
        for _ in range(100):
            pair.send_output(request.id, OutputStream.STDOUT, bytes(32 * 1024))
        with pytest.raises(ExecError, match="faster"):
            await running


async def test_a_stream_yields_output_and_closing_it_kills_the_command() -> None:
    async with running_link() as pair:
        chunks: list[ExecChunk] = []
        stream = pair.link.stream_command("tail -f x")
        first = asyncio.ensure_future(anext(stream))
        request = await pair.receive()
        assert isinstance(request, StartCommand)
        assert (request.stream, request.timeout_s) == (True, None)
        pair.send_output(request.id, OutputStream.STDOUT, b"one")
        chunks.append(await first)
        pair.send_output(request.id, OutputStream.STDERR, b"two")
        pair.send(Done(request.id, 0))
        async for chunk in stream:
            chunks.append(chunk)
        assert [(chunk.stream, chunk.data, chunk.ended) for chunk in chunks] == [
            (OutputStream.STDOUT, b"one", False),
            (OutputStream.STDERR, b"two", False),
            (OutputStream.STDOUT, b"", True),
        ]
        assert chunks[-1].exit_status == 0
        stream = pair.link.stream_command("yes")
        first = asyncio.ensure_future(anext(stream))
        request = await pair.receive()
        assert isinstance(request, StartCommand)
        pair.send_output(request.id, OutputStream.STDOUT, b"y\n")
        await first
        await stream.aclose()
        assert await pair.receive() == Kill(request.id)


async def test_a_shell_takes_input_and_keeps_its_end() -> None:
    async with running_link() as pair:
        shell = await pair.link.open_shell("exec sh")
        request = await pair.receive()
        assert isinstance(request, StartCommand)
        assert (request.command, request.has_input, request.stream, request.timeout_s) == ("exec sh", True, True, None)
        await shell.write(b"echo \xff\n")
        assert await pair.receive() == Input(request.id, base64.b64encode(b"echo \xff\n").decode())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(shell.read(), 0.05)
        pair.send_output(request.id, OutputStream.STDOUT, b"one")
        assert await asyncio.wait_for(shell.read(), 20) == ExecChunk(OutputStream.STDOUT, b"one")
        pair.send(Done(request.id, 3))
        for _ in range(2):
            last = await asyncio.wait_for(shell.read(), 20)
            assert (last.ended, last.exit_status) == (True, 3)


async def test_a_shell_that_is_closed_or_cut_off() -> None:
    async with running_link() as pair:
        shell = await pair.link.open_shell("exec sh")
        request = await pair.receive()
        assert isinstance(request, StartCommand)
        await shell.close()
        assert await pair.receive() == Kill(request.id)
        shell = await pair.link.open_shell("exec sh")
        await pair.receive()
        pair.send(Lost("tunnel-lost", "the connection broke"))
        for _ in range(2):
            with pytest.raises(ExecError, match="the connection broke"):
                await asyncio.wait_for(shell.read(), 20)
        with pytest.raises(TunnelDown):
            await pair.link.open_shell("exec sh")


# -- closing ---------------------------------------------------------------------------------------------------------


async def test_close_waits_for_the_worker_until_its_timeout() -> None:
    async with contextlib.AsyncExitStack() as stack:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        handle = await stack.enter_async_context(WorkerHandle("iceland", 0, reader, writer, WorkerPool()))
        link = WorkerLink(
            "iceland",
            handle,
            prompter=None,
            on_connected=lambda _: None,
            on_forward_failed=lambda _: None,
            on_peer_refused=lambda _: None,
        )
        stack.enter_context(theirs)
        theirs.settimeout(20)
        await link.close(0.05)  # the worker does not answer: the caller has to kill it
        assert protocol.decode_message(await asyncio.to_thread(theirs.recv, 1000)) == Close()
        closing = asyncio.create_task(link.close(20.0))
        assert protocol.decode_message(await asyncio.to_thread(theirs.recv, 1000)) == Close()
        theirs.sendall(protocol.encode_message(Lost("tunnel-lost", "a last message")) + b"nonsense\n")
        theirs.close()
        await closing
        await link.close(20.0)  # the worker is gone
