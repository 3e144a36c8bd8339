"""A streaming answer under way, over real sockets: silent, late, left by its client, and read slowly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Callable

import pytest

from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import DeadlineExceeded
from gpumesh.lab.profile import Faults
from gpumesh.mesh.requests import silence_watch, streaming
from tests.mesh.meshes import (
    count_final_frames,
    host,
    make_call,
    mesh_of_hosts,
    mesh_of_nodes,
    node,
    ollama_script,
    send,
    text_of,
)
from tests.mesh.requests.streams import FAULTS, FINAL, FRAME, PATIENCE_S, send_and_cut, uncut_text
from tests.mesh.servers import LAST_CHUNK, Exchange, chunk, chunked_head, serve
from tests.tunnels.polling import wait_until

# -- silence ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_silent_node_is_waited_for_where_there_is_no_other(impatient: None) -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        uncut = await uncut_text(mesh, "/api/chat")
        await mesh.hosts["a"].set_faults(Faults(stall_after_tokens=5))
        answer = await send(mesh.mesh, make_call())
        data = await anext(answer)

        async def lift() -> None:
            await asyncio.sleep(2.5 * PATIENCE_S)
            await mesh.hosts["a"].set_faults(Faults())

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(lift())
            data += await answer.read()
        assert text_of(data) == uncut
        assert (answer.attempts, answer.continuations) == (1, 0)


async def test_the_pace_of_a_node_is_learned_from_whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence_watch, "MIN_TIMEOUT_S", 0.0)
    async with mesh_of_hosts(host("a", tokens_per_s=20.0, answer_tokens=(8, 8))) as mesh:
        await uncut_text(mesh, "/api/chat")
        pauses = mesh.mesh._send_context.pauses  # nobody but the streams has it
        longest = pauses.longest_s("a", "m:latest")
        assert longest is not None
        assert longest >= 0.04
        assert silence_watch.silence_timeout_s(longest) == pytest.approx(silence_watch.PAUSE_FACTOR * longest)


@pytest.mark.slow
async def test_a_client_that_reads_slowly_makes_no_silence(impatient: None) -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        answer = await send(mesh.mesh, make_call())
        data = await anext(answer)
        await asyncio.sleep(2.5 * PATIENCE_S)
        data += await answer.read()
        assert count_final_frames(data) == 1
        assert answer.node == "a"
        assert answer.continuations == 0


# -- deadline, client, end -------------------------------------------------------------------------------------------


async def test_the_deadline_holds_over_the_whole_answer() -> None:
    async with mesh_of_hosts(host("a", tokens_per_s=20.0), host("b", tokens_per_s=20.0)) as mesh:
        answer = await send(mesh.mesh, make_call(), timeout_s=0.4)
        with pytest.raises(DeadlineExceeded):
            await answer.read()
        assert answer.outcome is Outcome.DEADLINE
        assert mesh.attempts("a") == {Outcome.DEADLINE: 1}
        assert mesh.attempts("b") == {}
        await wait_until(mesh.wait_settled, "the generation stops")
        assert mesh.mesh.request_counters.failed == 1


async def test_the_deadline_holds_during_failover() -> None:
    async with mesh_of_hosts(host("a", slots=1), host("b", slots=1, tokens_per_s=5.0), max_parallel=1) as mesh:
        filler = await send(mesh.mesh, make_call(), node="b")
        await anext(filler)
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=3))
        answer = await send(mesh.mesh, make_call(), timeout_s=0.5)
        with pytest.raises(DeadlineExceeded):
            await answer.read()
        await filler.aclose()
        await wait_until(mesh.wait_settled, "nothing is in flight")
        assert (mesh.mesh.request_counters.failed, mesh.mesh.request_counters.cancelled) == (1, 1)


async def test_a_client_that_leaves_stops_the_generation() -> None:
    async with mesh_of_hosts(host("a", tokens_per_s=50.0)) as mesh:
        answer = await send(mesh.mesh, make_call())
        await anext(answer)
        await answer.aclose()
        await answer.aclose()
        await wait_until(lambda: mesh.hosts["a"].counters.cancelled == 1, "the host stops")
        assert answer.outcome is Outcome.CLIENT_GONE
        assert mesh.attempts("a") == {Outcome.CLIENT_GONE: 1}
        assert mesh.mesh.request_counters.cancelled == 1
        assert mesh.wait_settled()
        with pytest.raises(StopAsyncIteration):
            await anext(answer)


async def test_a_client_may_leave_during_failover() -> None:
    async with mesh_of_hosts(host("a", slots=1), host("b", slots=1, tokens_per_s=5.0), max_parallel=1) as mesh:
        filler = await send(mesh.mesh, make_call(), node="b")
        await anext(filler)
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=3))
        answer = await send(mesh.mesh, make_call())
        reading = asyncio.create_task(answer.read())
        await wait_until(lambda: mesh.mesh.snapshot().gateway.queued == 1, "the rest waits for a place")
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        assert answer.outcome is Outcome.CLIENT_GONE
        assert mesh.mesh.snapshot().gateway.queued == 0
        await filler.aclose()
        await wait_until(mesh.wait_settled, "nothing is in flight")
        assert mesh.mesh.request_counters.cancelled == 2


async def test_the_slot_is_free_as_soon_as_the_final_frame_was_seen() -> None:
    go_on = asyncio.Event()

    async def lingering(exchange: Exchange) -> None:
        await exchange.send(chunked_head() + chunk(FRAME) + chunk(FINAL))
        await go_on.wait()
        await exchange.send(LAST_CHUNK)

    async with serve(ollama_script(lingering)) as server, mesh_of_nodes(node("a", server.url)) as mesh:
        answer = await send(mesh.mesh, make_call())
        got = b""
        while b'"done":true' not in got:
            got += await anext(answer)
        assert mesh.in_flight() == 0
        assert mesh.mesh.request_counters.served == 0
        go_on.set()
        assert await answer.read() == b""
        assert mesh.mesh.request_counters.served == 1


async def test_a_body_that_does_not_end_after_its_final_frame_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "DRAIN_S", 0.05)

    async def endless(exchange: Exchange) -> None:
        await exchange.send(chunked_head() + chunk(FRAME + FINAL))
        await exchange.wait_client_gone()
        exchange.closed = True

    async with serve(ollama_script(endless)) as server, mesh_of_nodes(node("a", server.url)) as mesh:
        answer = await send(mesh.mesh, make_call())
        assert await answer.read() == FRAME + FINAL
        assert answer.outcome is Outcome.SERVED


async def test_a_lost_tunnel_is_noticed_in_mid_answer() -> None:
    async with mesh_of_hosts(host("a", tokens_per_s=50.0), host("b")) as mesh:
        uncut = text_of(await (await send(mesh.mesh, make_call(), node="b")).read())
        answer = await send(mesh.mesh, make_call())
        data = await anext(answer)
        mesh.mesh.fleet["a"].ledger.abort_all_attempts()  # as its tunnel's end would
        data += await answer.read()
        assert text_of(data) == uncut
        assert mesh.attempts("a") == {Outcome.UNREACHABLE: 1}


@pytest.mark.slow
async def test_a_slow_reader_holds_back_the_server() -> None:
    sent = 0
    line = json.dumps({"message": {"content": "x" * 60_000}, "done": False}).encode() + b"\n"

    async def flood(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.send(chunked_head())
        for _ in range(4000):
            await exchange.send(chunk(line))
            sent += len(line)

    async with serve(ollama_script(flood)) as server, mesh_of_nodes(node("a", server.url)) as mesh:
        answer = await send(mesh.mesh, make_call())
        await anext(answer)
        seen = -1
        while sent != seen:  # until it stands still
            seen = sent
            await asyncio.sleep(0.3)
        assert sent < 32 << 20  # what the kernel's own buffers take
        await answer.aclose()


async def test_the_tunnel_of_the_failed_node_is_suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        reasons: list[str] = []
        tunnel = mesh.mesh.tunnel("a")
        monkeypatch.setattr(tunnel, "suspect", reasons.append)
        await uncut_text(mesh, "/api/chat")
        assert reasons == []
        await send_and_cut(mesh, "/api/chat", Faults(cut_after_tokens=3), await uncut_text(mesh, "/api/chat"))
        assert len(reasons) == 1
        load = next(state.load for state in mesh.mesh.snapshot().nodes if state.name == "a")
        assert load.failed == 1


# -- pushed into a client's stream -----------------------------------------------------------------------------------


class ClientBuffer:
    """A client's stream that takes ``limit`` bytes until ``read`` makes room, or that is gone."""

    def __init__(self, limit: float = math.inf) -> None:
        self.on_writable: Callable[[], None] | None = None
        self.limit = limit
        self.is_gone = False
        self.received = bytearray()
        self._readable = asyncio.Event()

    @property
    def backpressured(self) -> bool:
        return len(self.received) > self.limit

    def write(self, data: bytes) -> None:
        if self.is_gone:
            raise ConnectionResetError("the client is gone")
        self.received += data

    async def drain(self, is_wanted: Callable[[], bool]) -> None:
        while self.backpressured:
            assert is_wanted() in (True, False)
            self._readable.clear()
            await self._readable.wait()

    def read_all(self) -> None:
        self.limit = math.inf
        self._readable.set()
        assert self.on_writable is not None
        self.on_writable()


async def test_an_answer_is_pushed_to_its_client_whole() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        uncut = await uncut_text(mesh, "/api/chat")
        answer, client = await send(mesh.mesh, make_call()), ClientBuffer()
        assert repr(answer) == "<StreamingAnswer a FLOWING backpressured, 0 continuations>"
        await answer.send_to(client)
        assert text_of(bytes(client.received)) == uncut
        assert answer.outcome is Outcome.SERVED
        assert client.on_writable is None
        assert repr(answer).startswith("<StreamingAnswer a ENDED")


async def test_a_client_that_takes_nothing_pauses_the_connection_to_the_node() -> None:
    sent = 0
    line = json.dumps({"message": {"content": "x" * 60_000}, "done": False}).encode() + b"\n"

    async def flood(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.send(chunked_head())
        for _ in range(400):
            await exchange.send(chunk(line))
            sent += len(line)
        await exchange.send(chunk(FINAL) + LAST_CHUNK)

    async with serve(ollama_script(flood)) as server, mesh_of_nodes(node("a", server.url)) as mesh:
        answer, client = await send(mesh.mesh, make_call()), ClientBuffer(limit=100_000)
        sending = asyncio.create_task(answer.send_to(client))
        seen = -1
        while sent != seen or not client.received:  # until it stands still
            seen = sent
            await asyncio.sleep(0.3)
        assert len(client.received) < 300_000
        assert "FLOWING backpressured" in repr(answer)
        client.read_all()
        await sending
        assert bytes(client.received) == line * 400 + FINAL
        assert answer.outcome is Outcome.SERVED


async def test_a_client_that_is_gone_ends_the_generation() -> None:
    async with mesh_of_hosts(host("a", tokens_per_s=50.0)) as mesh:
        answer, client = await send(mesh.mesh, make_call()), ClientBuffer()
        sending = asyncio.create_task(answer.send_to(client))
        await wait_until(lambda: client.received.count(b"\n") > 3, "it is under way")
        client.is_gone = True
        with pytest.raises(ConnectionResetError):
            await sending
        await wait_until(lambda: mesh.hosts["a"].counters.cancelled == 1, "the host stops")
        assert answer.outcome is Outcome.CLIENT_GONE
        assert mesh.wait_settled()


async def test_a_cut_answer_is_pushed_on_from_another_node() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        uncut = await uncut_text(mesh, "/api/chat")
        await mesh.hosts["a"].set_faults(FAULTS["reset"])
        answer, client = await send(mesh.mesh, make_call()), ClientBuffer()
        await answer.send_to(client)
        assert text_of(bytes(client.received)) == uncut
        assert (answer.node, answer.continuations, answer.outcome) == ("b", 1, Outcome.SERVED)
