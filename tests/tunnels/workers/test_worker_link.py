"""The supervisor's side, while the test speaks the worker's part over a real socket."""

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
    Exec,
    Failed,
    ForwardFailed,
    FromWorker,
    Kill,
    Lost,
    Output,
    PeerRefused,
    Ping,
    Pong,
    Prompt,
    Reply,
    ToWorker,
)
from gpumesh.tunnels.workers.worker_link import WorkerLink, cause_from_error, error_from_cause
from gpumesh.tunnels.workers.worker_pool import LINE_LIMIT, WorkerHandle, WorkerPool
from tests.tunnels.polling import wait_until


@dataclass
class Talk:
    """``talk`` and, as the worker, ``hear`` and ``say``."""

    talk: WorkerLink
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ups: list[ConnectionInfo] = field(default_factory=list)
    refused: list[ForwardFailed] = field(default_factory=list)
    peers: list[PeerRefused] = field(default_factory=list)

    async def hear(self) -> ToWorker | FromWorker:
        return protocol.decode_message(await asyncio.wait_for(self.reader.readline(), 20))

    def say(self, *messages: FromWorker) -> None:
        for message in messages:
            self.writer.write(protocol.encode_message(message))

    def output(self, number: int, stream: OutputStream, data: bytes) -> None:
        self.say(Output(number, stream.value, base64.b64encode(data).decode()))


@contextlib.asynccontextmanager
async def talking(ask: Prompter | None = None) -> AsyncIterator[Talk]:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LINE_LIMIT)
    far_reader, far_writer = await asyncio.open_unix_connection(sock=theirs, limit=LINE_LIMIT)
    ups: list[ConnectionInfo] = []
    refused: list[ForwardFailed] = []
    peers: list[PeerRefused] = []
    async with WorkerHandle("iceland", 0, reader, writer, WorkerPool()) as handle:
        talk = WorkerLink(
            "iceland",
            handle,
            prompter=ask,
            on_connected=ups.append,
            on_forward_failed=refused.append,
            on_peer_refused=peers.append,
        )
        try:
            async with asyncio.TaskGroup() as group:
                listening = group.create_task(talk.receive_messages(group))
                yield Talk(talk, far_reader, far_writer, ups, refused, peers)
                listening.cancel()
        finally:
            far_writer.close()


async def ended(one: Talk) -> Cause:
    return await asyncio.wait_for(asyncio.shield(one.talk.end_cause), 20)


# -- how it ends -----------------------------------------------------------------------------------------------------


async def test_up_and_what_ends_it() -> None:
    async with talking() as one:
        assert not one.talk.connected.is_set()
        one.say(ConnectionInfo(1.5, "SSH-2.0-x", "aes"))
        await asyncio.wait_for(one.talk.connected.wait(), 20)
        assert one.ups == [ConnectionInfo(1.5, "SSH-2.0-x", "aes")]
        one.say(Lost("tunnel-lost", "the connection broke", "a hint"), Lost("tunnel", "and more"))
        assert await ended(one) == Cause("tunnel-lost", "the connection broke", "a hint")


@pytest.mark.parametrize(("code", "needs_person"), [("auth-refused", True), ("connect-refused", False), ("new", False)])
async def test_who_must_act_is_known_by_the_code(code: str, needs_person: bool) -> None:
    async with talking() as one:
        one.say(Failed(code, "why", "hint"))
        cause = await ended(one)
        assert (cause.message, cause.hint, cause.needs_person) == ("why", "hint", needs_person)
        error = error_from_cause(cause, "iceland")
        assert (error.message, error.hint, error.node) == ("why", "hint", "iceland")
        assert cause_from_error(error).needs_person is needs_person


@pytest.mark.parametrize("line", [b"", b"{}\n", b"\xff\n", b'{"kind": "Up"}\n', b'{"kind": "Po'])
async def test_a_worker_that_ends_or_talks_nonsense_is_a_lost_tunnel(line: bytes) -> None:
    async with talking() as one:
        one.writer.write(line)
        one.writer.close()
        cause = await ended(one)
        assert cause.code == "tunnel-lost"
        assert "iceland" in cause.message
        assert not cause.needs_person


async def test_refused_forwards_are_passed_on() -> None:
    refused = ForwardFailed(Target("127.0.0.1", 80), "backend-unreachable", "nothing answers")
    async with talking() as one:
        one.say(refused)
        await wait_until(lambda: one.refused == [refused], "the refusal")


async def test_users_who_were_refused_are_passed_on() -> None:
    other = PeerRefused(40123, 1001, "bob")
    async with talking() as one:
        one.say(other)
        await wait_until(lambda: one.peers == [other], "the refusal")


# -- pings -----------------------------------------------------------------------------------------------------------


async def test_each_ping_gets_its_own_answer() -> None:
    async with talking() as one:
        pings = [asyncio.create_task(one.talk.ping(20.0)) for _ in range(3)]
        asked = [await one.hear() for _ in pings]
        assert all(isinstance(ping, Ping) for ping in asked)
        for ping in reversed(asked):
            assert isinstance(ping, Ping)
            one.say(Pong(ping.id, float(ping.id)), Pong(ping.id, 99.0), Pong(12345, 1.0))
        assert await asyncio.gather(*pings) == [float(ping.id) for ping in asked if isinstance(ping, Ping)]


async def test_no_answer_is_no_sign_of_life() -> None:
    async with talking() as one:
        assert await one.talk.ping(0.01) is None  # the worker itself is silent
        run_questioning_server = asyncio.create_task(one.talk.ping(20.0))
        while not isinstance(ping := await one.hear(), Ping) or ping.timeout_s < 1:
            pass
        one.say(Pong(ping.id, None))  # the host is
        assert await run_questioning_server is None
        waiting = asyncio.create_task(one.talk.ping(20.0))
        await one.hear()
        one.talk.finish(Cause("tunnel-lost", "it is over"))
        assert await waiting is None
    assert await one.talk.ping(5.0) is None  # the worker is gone


# -- questions -------------------------------------------------------------------------------------------------------


async def test_a_question_holds_nothing_up() -> None:
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asked: list[tuple[str, str, bool]] = []

    async def ask(node: str, text: str, *, echo: bool) -> str | None:
        asked.append((node, text, echo))
        return await answer

    async with talking(ask) as one:
        one.say(Prompt(7, "Code: ", True))
        await wait_until(lambda: bool(asked), "the question")
        assert one.talk.open_prompts == 1
        one.say(ConnectionInfo(None, "x"))
        await asyncio.wait_for(one.talk.connected.wait(), 20)
        answer.set_result("123")
        assert await one.hear() == Reply(7, "123")
        assert asked == [("iceland", "Code: ", True)]
        await wait_until(lambda: one.talk.open_prompts == 0, "the end of the question")


async def test_without_a_person_the_answer_is_none_at_once() -> None:
    async with talking() as one:
        one.say(Prompt(7, "Code: ", False))
        assert await one.hear() == Reply(7, None)


# -- commands --------------------------------------------------------------------------------------------------------


async def test_a_command_and_its_output() -> None:
    async with talking() as one:
        running = asyncio.create_task(one.talk.run_command("nvidia-smi -L", timeout_s=20.0, limit_bytes=100))
        order = await one.hear()
        assert isinstance(order, Exec)
        assert (order.command, order.timeout_s, order.limit_bytes, order.stream) == ("nvidia-smi -L", 20.0, 100, False)
        one.output(order.id, OutputStream.STDOUT, b"GPU ")
        one.output(order.id, OutputStream.STDERR, b"\xff")
        one.output(order.id, OutputStream.STDOUT, b"0")
        one.output(999, OutputStream.STDOUT, b"of nobody")
        one.say(Done(order.id, 3, truncated=True))
        result = await running
        assert (result.exit_status, result.stdout, result.stderr, result.truncated) == (3, b"GPU 0", b"\xff", True)


@pytest.mark.parametrize("how", ["error", "cut", "ended before"])
async def test_a_command_that_fails(how: str) -> None:
    async with talking() as one:
        if how == "ended before":
            one.talk.finish(Cause("tunnel-lost", "the line is down"))
            with pytest.raises(TunnelDown, match="iceland"):
                await one.talk.run_command("true", timeout_s=5.0, limit_bytes=10)
            return
        running = asyncio.create_task(one.talk.run_command("true", timeout_s=20.0, limit_bytes=10))
        order = await one.hear()
        assert isinstance(order, Exec)
        if how == "error":
            one.say(Done(order.id, None, error="the host gives no session"))
        else:
            one.talk.finish(Cause("tunnel-lost", "the line is down"))
        with pytest.raises(ExecError, match="no session" if how == "error" else "the line is down") as caught:
            await running
        assert caught.value.node == "iceland"


async def test_a_worker_that_does_not_keep_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "DEADLINE_SLACK_S", 0.05)
    async with talking() as one:
        with pytest.raises(ExecError, match=r"within 0\.05 s"):
            await one.talk.run_command("sleep 600", timeout_s=0.05, limit_bytes=10)
        order = await one.hear()
        assert isinstance(order, Exec)
        assert await one.hear() == Kill(order.id)
        one.say(Done(order.id, None, error="late"))  # nobody waits for it any more
        assert not one.talk._commands


async def test_a_cancelled_command_is_killed() -> None:
    async with talking() as one:
        running = asyncio.create_task(one.talk.run_command("sleep 600", timeout_s=60.0, limit_bytes=10))
        order = await one.hear()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert isinstance(order, Exec)
        assert await one.hear() == Kill(order.id)


async def test_output_beyond_what_was_asked_for_is_not_kept() -> None:
    """A worker that does not keep to ``limit_bytes``: it may be what a hostile host has taken over."""
    async with talking() as one:
        running = asyncio.create_task(one.talk.run_command("yes", timeout_s=60.0, limit_bytes=1000))
        order = await one.hear()
        assert isinstance(order, Exec)
        for _ in range(100):
            one.output(order.id, OutputStream.STDOUT, bytes(32 * 1024))
        with pytest.raises(ExecError, match="faster"):
            await running


async def test_a_stream_gives_what_comes_and_stops_what_is_not_read() -> None:
    async with talking() as one:
        chunks: list[ExecChunk] = []
        stream = one.talk.stream_command("tail -f x")
        first = asyncio.ensure_future(anext(stream))
        order = await one.hear()
        assert isinstance(order, Exec)
        assert (order.stream, order.timeout_s) == (True, None)
        one.output(order.id, OutputStream.STDOUT, b"one")
        chunks.append(await first)
        one.output(order.id, OutputStream.STDERR, b"two")
        one.say(Done(order.id, 0))
        async for chunk in stream:
            chunks.append(chunk)
        assert [(chunk.stream, chunk.data, chunk.ended) for chunk in chunks] == [
            (OutputStream.STDOUT, b"one", False),
            (OutputStream.STDERR, b"two", False),
            (OutputStream.STDOUT, b"", True),
        ]
        assert chunks[-1].exit_status == 0
        stream = one.talk.stream_command("yes")
        first = asyncio.ensure_future(anext(stream))
        order = await one.hear()
        assert isinstance(order, Exec)
        one.output(order.id, OutputStream.STDOUT, b"y\n")
        await first
        await stream.aclose()
        assert await one.hear() == Kill(order.id)


# -- closing ---------------------------------------------------------------------------------------------------------


async def test_closing_waits_for_the_worker_and_not_for_ever() -> None:
    async with contextlib.AsyncExitStack() as stack:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        handle = await stack.enter_async_context(WorkerHandle("iceland", 0, reader, writer, WorkerPool()))
        talk = WorkerLink(
            "iceland",
            handle,
            prompter=None,
            on_connected=lambda _: None,
            on_forward_failed=lambda _: None,
            on_peer_refused=lambda _: None,
        )
        stack.enter_context(theirs)
        theirs.settimeout(20)
        await talk.close(0.05)  # says nothing: it is left to the caller to kill it
        assert protocol.decode_message(await asyncio.to_thread(theirs.recv, 1000)) == Close()
        closing = asyncio.create_task(talk.close(20.0))
        assert protocol.decode_message(await asyncio.to_thread(theirs.recv, 1000)) == Close()
        theirs.sendall(protocol.encode_message(Lost("tunnel-lost", "some last word")) + b"nonsense\n")
        theirs.close()
        await closing
        await talk.close(20.0)  # it has gone
