"""One try on one node, against real sockets: what each failure is taken for, and that its place is given back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import Outcome
from gpumesh.event_loop.slice_queue import SLICE_BYTES
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.requests import answer_reading as module
from gpumesh.mesh.requests.answer import WholeAnswer
from gpumesh.mesh.requests.answer_reading import OpenedStream
from gpumesh.mesh.requests.attempt import ask_node, run_attempt
from gpumesh.mesh.requests.body_sink import BUFFER_BYTES
from gpumesh.mesh.requests.connections.upstream_connection import ReadState
from gpumesh.mesh.requests.failures import FailedAttempt
from gpumesh.mesh.requests.upstream import Upstream
from tests.mesh.meshes import MODEL, RunningMesh, make_call, mesh_of_nodes, node, ollama_script
from tests.mesh.nodes.build import take_lease
from tests.mesh.servers import LAST_CHUNK, Exchange, Script, answer_with, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until

FRAME = b'{"message":{"content":"x"},"done":false}\n'
FINAL = b'{"message":{"content":""},"done":true,"done_reason":"stop","eval_count":5,"eval_duration":1000000}\n'


class Place:
    """A leased place on a mesh's only node, and a client."""

    def __init__(self, running: RunningMesh, upstream: Upstream) -> None:
        self.running = running
        self.upstream = upstream
        self.node = running.mesh.fleet["a"]  # the mesh leases places only to requests of its own
        self.lease: Lease = take_lease(self.node, Demand(model=MODEL), asyncio.get_running_loop().time())

    async def attempt(self, call: HttpCall, *, timeout_s: float = 10.0) -> WholeAnswer | OpenedStream | FailedAttempt:
        clock = asyncio.get_running_loop().time
        reader = partial(Continuation, call.path, call.body, clock=clock)
        return await run_attempt(self.upstream, self.lease, call, timeout_s=timeout_s, continuation=reader)

    def ended(self) -> dict[Outcome, int]:
        assert self.running.in_flight() == 0
        return self.running.attempts("a")


@asynccontextmanager
async def placed(script: Script) -> AsyncIterator[Place]:
    async with (
        serve(ollama_script(script)) as server,
        mesh_of_nodes(node("a", server.url)) as running,
        Upstream() as upstream,
    ):
        yield Place(running, upstream)


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (answer_with(reset=True), Outcome.UNREACHABLE),
        (answer_with(close=True), Outcome.UNREACHABLE),
        (answer_with(b"no HTTP\r\n\r\n"), Outcome.UNREACHABLE),
        (answer_with(whole_response(b"{}", status="500 Oops")), Outcome.SERVER_ERROR),
        (answer_with(whole_response(b"{}", status="502 Oops")), Outcome.SERVER_ERROR),
        (answer_with(whole_response(b"{}", status="503 Oops")), Outcome.SERVER_ERROR),
        (answer_with(whole_response(b"{}", status="504 Oops")), Outcome.SERVER_ERROR),
        (answer_with(whole_response(b"{}", status="429 Oops")), Outcome.BUSY),
        (answer_with(whole_response(b"{}", status="404 Oops")), Outcome.MODEL_NOT_FOUND),
        (answer_with(whole_response(b"{}")[:-1], close=True), Outcome.CUT),
        (answer_with(chunked_head(), close=True), Outcome.CUT),
        (answer_with(chunked_head() + LAST_CHUNK), Outcome.CUT),
        (answer_with(chunked_head() + chunk(FRAME[:-3]) + LAST_CHUNK), Outcome.SERVER_ERROR),
        (answer_with(chunked_head() + chunk(FRAME[:-3]), close=True), Outcome.CUT),
        (answer_with(chunked_head() + chunk(b'{"error":"no memory"}\n') + LAST_CHUNK), Outcome.SERVER_ERROR),
        (answer_with(chunked_head("text/event-stream") + chunk(b'data: {"error":{}}\n\n')), Outcome.SERVER_ERROR),
    ],
)
async def test_what_another_node_may_make_good(script: Script, outcome: Outcome) -> None:
    path = "/v1/chat/completions" if outcome is Outcome.SERVER_ERROR and "event" in repr(script) else "/api/chat"
    async with placed(script) as place:
        result = await place.attempt(make_call(path))
        assert isinstance(result, FailedAttempt)
        assert result.outcome is outcome
        assert result.node == "a"
        assert place.ended() == {outcome: 1}


async def test_the_servers_own_words_are_kept() -> None:
    async with placed(answer_with(chunked_head() + chunk(b'{"error":"no memory"}\n') + LAST_CHUNK)) as place:
        result = await place.attempt(make_call())
        assert isinstance(result, FailedAttempt)
        assert result.answer is not None
        assert (result.answer.status, json.loads(result.answer.body)) == (500, {"error": "no memory"})
        assert "no memory" in str(result.error)


@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "403 Forbidden", "413 Too Large"])
async def test_a_clients_own_mistake_is_its_answer(status: str) -> None:
    async with placed(answer_with(whole_response(b'{"error":"you"}', status=status))) as place:
        result = await place.attempt(make_call())
        assert isinstance(result, WholeAnswer)
        assert result.status == int(status[:3])
        assert result.body == b'{"error":"you"}'
        assert place.ended() == {Outcome.CLIENT_ERROR: 1}


async def test_a_whole_answer_is_held_until_it_is_whole() -> None:
    async with placed(answer_with(whole_response(FINAL))) as place:
        result = await place.attempt(make_call(stream=False))
        assert isinstance(result, WholeAnswer)
        assert result.body == FINAL
        assert result.counters is not None
        assert result.counters.tokens == 5
        assert place.ended() == {Outcome.SERVED: 1}


async def test_what_is_too_large_to_be_held_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_BYTES", 1000)

    async def endless(exchange: Exchange) -> None:
        await exchange.send(chunked_head("application/json"))
        while not exchange.writer.is_closing():
            await exchange.send(chunk(b"x" * 600))

    async with placed(endless) as place:
        result = await place.attempt(make_call(stream=False))
        assert isinstance(result, OpenedStream), "it is passed on as it comes: the bound is ours, and no fault"
        assert result.continuation is None
        assert 1000 < len(result.first_bytes) < 1000 + BUFFER_BYTES + SLICE_BYTES
        assert place.lease.can_move is None
        connection = result.response._exchange.connection
        assert connection is not None
        await wait_until(lambda: connection._read_state is ReadState.BACKPRESSURED, "the server is read no further")
        result.response.abort()
        place.lease.release(Outcome.CLIENT_GONE)
        assert place.ended() == {Outcome.CLIENT_GONE: 1}


async def test_a_stream_opens_with_its_first_whole_frame_and_keeps_its_place() -> None:
    go_on = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.send(chunked_head() + chunk(FRAME[:9]))
        await exchange.send(chunk(FRAME[9:] + FRAME[:5]))
        await go_on.wait()
        await exchange.send(chunk(FRAME[5:] + FINAL) + LAST_CHUNK)

    async with placed(script) as place:
        result = await place.attempt(make_call())
        assert isinstance(result, OpenedStream)
        assert result.first_bytes == FRAME
        assert place.running.in_flight() == 1
        go_on.set()
        assert result.continuation is not None
        data = await result.response.read()
        assert result.continuation.feed(data) == FRAME + FINAL
        result.response.abort()
        result.lease.release(Outcome.SERVED)
        assert place.ended() == {Outcome.SERVED: 1}


async def test_what_is_no_generated_text_is_passed_on_untouched() -> None:
    line = b'{"status":"pulling manifest"}\n'
    async with placed(answer_with(chunked_head() + chunk(line[:7]))) as place:
        result = await place.attempt(make_call("/api/pull"))
        assert isinstance(result, OpenedStream)
        assert (result.first_bytes, result.continuation) == (line[:7], None)
        result.response.abort()
        result.lease.discard()


async def test_the_deadline_is_no_fault_and_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def silent(exchange: Exchange) -> None:
        await exchange.wait_client_gone()
        exchange.closed = True
        gone.set()

    async with asyncio.timeout(10), placed(silent) as place:
        result = await place.attempt(make_call(), timeout_s=0.05)
        assert isinstance(result, FailedAttempt)
        assert result.outcome is Outcome.DEADLINE
        await gone.wait()
        assert place.ended() == {Outcome.DEADLINE: 1}


@pytest.mark.parametrize("begun", [False, True], ids=["before the head", "after the head"])
async def test_a_lost_way_ends_it_at_once(begun: bool) -> None:
    asked = asyncio.Event()

    async def silent(exchange: Exchange) -> None:
        if begun:
            await exchange.send(chunked_head())
        asked.set()
        await exchange.wait_client_gone()
        exchange.closed = True

    async with asyncio.timeout(10), placed(silent) as place:
        trying = asyncio.create_task(place.attempt(make_call(), timeout_s=60.0))
        await asked.wait()
        place.lease.abort_attempt()
        result = await trying
        assert isinstance(result, FailedAttempt)
        assert result.outcome is Outcome.UNREACHABLE
        assert place.ended() == {Outcome.UNREACHABLE: 1}


async def test_a_way_that_was_lost_between_two_requests_on_one_place_is_not_used_again() -> None:
    async with placed(answer_with(whole_response(b"{}"))) as place:
        assert await ask_node(place.upstream, place.lease, make_call(), timeout_s=10.0) == (200, b"{}")
        place.lease.abort_attempt()
        result = await place.attempt(make_call())
        assert isinstance(result, FailedAttempt)
        assert result.outcome is Outcome.UNREACHABLE
        assert place.ended() == {Outcome.UNREACHABLE: 1}


async def test_a_client_that_leaves_stops_the_server() -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def silent(exchange: Exchange) -> None:
        asked.set()
        await exchange.wait_client_gone()
        exchange.closed = True
        gone.set()

    async with asyncio.timeout(10), placed(silent) as place:
        trying = asyncio.create_task(place.attempt(make_call()))
        await asked.wait()
        trying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await trying
        await gone.wait()
        assert place.ended() == {Outcome.CLIENT_GONE: 1}


# -- questions on the side -------------------------------------------------------------------------------------------


async def test_a_question_keeps_the_place() -> None:
    async with placed(answer_with(whole_response(b'{"a":1}'))) as place:
        assert await ask_node(place.upstream, place.lease, make_call(), timeout_s=10.0) == (200, b'{"a":1}')
        assert place.running.in_flight() == 1
        place.lease.discard()


async def test_a_question_that_is_not_understood_is_answered_too() -> None:
    async with placed(answer_with(whole_response(b"{}", status="400 Bad Request"))) as place:
        assert await ask_node(place.upstream, place.lease, make_call(), timeout_s=10.0) == (400, b"{}")
        place.lease.discard()


async def test_a_question_that_takes_too_long_is_no_failure() -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.wait_client_gone()
        exchange.closed = True

    async with placed(silent) as place:
        assert await ask_node(place.upstream, place.lease, make_call(), timeout_s=0.05) == (0, b"")
        assert place.running.in_flight() == 1
        place.lease.discard()


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (answer_with(reset=True), Outcome.UNREACHABLE),
        (answer_with(whole_response(b"{}")[:-1], close=True), Outcome.CUT),
        (answer_with(whole_response(b"{}", status="500 Oops")), Outcome.SERVER_ERROR),
        (answer_with(whole_response(b"{}", status="404 Oops")), Outcome.MODEL_NOT_FOUND),
    ],
)
async def test_a_node_that_fails_a_question_has_failed(script: Script, outcome: Outcome) -> None:
    async with placed(script) as place:
        result = await ask_node(place.upstream, place.lease, make_call(), timeout_s=10.0)
        assert isinstance(result, FailedAttempt)
        assert result.outcome is outcome
        assert place.ended() == {outcome: 1}


# -- heads -----------------------------------------------------------------------------------------------------------


async def test_host_is_the_backends_own_and_its_key_replaces_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUMESH_TEST_KEY", "sesame")
    heads: list[bytes] = []

    async def script(exchange: Exchange) -> None:
        heads.append(exchange.head)
        await exchange.send(whole_response(b"{}"))

    async with serve(ollama_script(script)) as server:
        spec = node("a", server.url.replace("127.0.0.1", "localhost"))
        keyed = type(spec.backend)(spec.backend.kind, spec.backend.targets, api_key_env="GPUMESH_TEST_KEY")
        spec = type(spec)("a", keyed)
        async with mesh_of_nodes(spec) as running, Upstream() as upstream:
            place = Place(running, upstream)
            call = make_call(stream=False)
            call = HttpCall(call.method, call.path, call.body, (*call.headers, ("X-Api-Key", "theirs"), ("X-A", "b")))
            await place.attempt(call)
    assert f"Host: 127.0.0.1:{server.port}\r\n".encode() in heads[0]
    assert b"Authorization: Bearer sesame\r\n" in heads[0]
    assert b"theirs" not in heads[0]
    assert b"X-A: b\r\n" in heads[0]
