"""A request on its way from node to node: which nodes are tried, how often, and what the client gets in the end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.prefill import ContinuationStrategy
from gpumesh.balancer.breaker import Breaker
from gpumesh.balancer.outcomes import MAX_ROUNDS, Outcome
from gpumesh.errors import DeadlineExceeded, ModelMissing, NoNodeError, QueueFull, StreamCut
from gpumesh.lab.profile import Faults, ModelProfile
from gpumesh.mesh.requests.answer import WholeAnswer
from gpumesh.topology import BackendKind
from tests.mesh.meshes import (
    JSON,
    RunningMesh,
    host,
    make_call,
    mesh_of_hosts,
    mesh_of_nodes,
    node,
    ollama_script,
    openai_script,
    send,
    text_of,
)
from tests.mesh.servers import Exchange, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until

CHATS = ("/api/chat", "/api/generate", "/v1/chat/completions")


async def assert_moved_on(mesh: RunningMesh, call: HttpCall, outcome: Outcome) -> None:
    answer = await send(mesh.mesh, call)
    assert answer.status == 200
    assert await answer.read()
    assert (answer.node, answer.attempts) == ("b", 2)
    assert mesh.attempts("a") == {outcome: 1}
    assert mesh.attempts("b") == {Outcome.SERVED: 1}
    counters = mesh.mesh.request_counters
    assert (counters.accepted, counters.served, counters.failed, counters.cancelled) == (1, 1, 0, 0)
    assert mesh.wait_settled()


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(
    ("faults", "outcome"),
    [
        (Faults(disconnect=True), Outcome.UNREACHABLE),
        (Faults(status=500), Outcome.SERVER_ERROR),
        (Faults(status=502), Outcome.SERVER_ERROR),
        (Faults(status=503), Outcome.SERVER_ERROR),
        (Faults(status=429), Outcome.BUSY),
        (Faults(cut_after_tokens=0), Outcome.UNREACHABLE),
        (Faults(end_after_tokens=0), Outcome.CUT),
        (Faults(error_line_after_tokens=0), Outcome.SERVER_ERROR),
    ],
)
async def test_any_failure_of_a_node_moves_the_request_on(faults: Faults, outcome: Outcome, stream: bool) -> None:
    for path in CHATS:
        async with mesh_of_hosts(host("a"), host("b")) as mesh:
            await mesh.hosts["a"].set_faults(Faults(**{**_fields(faults), "paths": CHATS}))
            await assert_moved_on(mesh, make_call(path, stream=stream), outcome)


def _fields(faults: Faults) -> dict[str, Any]:
    return {name: getattr(faults, name) for name in Faults.__slots__}


@pytest.mark.parametrize("kind", [BackendKind.OLLAMA, BackendKind.OPENAI])
@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (501, Outcome.NOT_SUPPORTED),
        (507, Outcome.SERVER_ERROR),
        (520, Outcome.SERVER_ERROR),
        (524, Outcome.SERVER_ERROR),
        (529, Outcome.BUSY),
        (530, Outcome.SERVER_ERROR),
        (599, Outcome.SERVER_ERROR),
    ],
)
@pytest.mark.parametrize("page", [True, False], ids=["web page", "json"])
async def test_a_status_of_a_proxy_moves_the_request_on(
    status: int, outcome: Outcome, kind: BackendKind, page: bool
) -> None:
    async def proxy(exchange: Exchange) -> None:
        if page:
            body, content_type = b"<html><title>Web server is down</title></html>", "text/html"
        else:
            body, content_type = b'{"error":{"message":"overloaded"}}', "application/json"
        await exchange.send(whole_response(body, status=f"{status} No", kind=content_type))

    async def good(exchange: Exchange) -> None:
        await exchange.send(whole_response(b'{"choices":[{"message":{"content":"y"},"finish_reason":"stop"}]}'))

    script = ollama_script if kind is BackendKind.OLLAMA else openai_script
    async with (
        serve(script(proxy)) as first,
        serve(script(good)) as second,
        mesh_of_nodes(node("a", first.url, weight=100.0, kind=kind), node("b", second.url, kind=kind)) as mesh,
    ):
        await assert_moved_on(mesh, make_call("/v1/chat/completions", stream=False), outcome)
        # 529 and 501 say nothing against the node, as 429 does not.
        assert mesh.mesh.snapshot().nodes[0].load.failed == (outcome is Outcome.SERVER_ERROR)


async def test_a_whole_body_that_stops_short_moves_the_request_on() -> None:
    async def short(exchange: Exchange) -> None:
        await exchange.send(whole_response(b'{"message":{"content":"x"},"done":true}')[:-5])
        exchange.close()

    async def good(exchange: Exchange) -> None:
        await exchange.send(whole_response(b'{"message":{"content":"y"},"done":true}'))

    async with (
        serve(ollama_script(short)) as first,
        serve(ollama_script(good)) as second,
        mesh_of_nodes(node("a", first.url, weight=100.0), node("b", second.url)) as mesh,
    ):
        await assert_moved_on(mesh, make_call(stream=False), Outcome.CUT)


async def test_a_refused_connection_moves_the_request_on() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(refuse=True))
        answer = await send(mesh.mesh, make_call())
        assert await answer.read()
        assert answer.node == "b"
        assert mesh.wait_settled()


async def test_a_model_that_is_listed_and_gone_moves_the_request_on_and_is_in_the_counts() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        mesh.hosts["a"].engine.store.clear()
        await assert_moved_on(mesh, make_call(), Outcome.MODEL_NOT_FOUND)
        load = mesh.mesh.snapshot().nodes[0].load
        assert (load.served, load.failed) == (0, 1)
        assert mesh.mesh.fleet["a"].ledger.breaker == Breaker(), "the node serves its other models"


@pytest.mark.parametrize("status", [400, 401, 403, 413])
async def test_a_mistake_of_the_client_is_answered_at_once_and_asked_of_no_other_node(status: int) -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(status=status, paths=CHATS))
        answer = await send(mesh.mesh, make_call())
        assert isinstance(answer, WholeAnswer)
        assert (answer.status, answer.node, answer.attempts) == (status, "a", 1)
        assert mesh.attempts("b") == {}
        assert mesh.mesh.request_counters.served == 1
        assert mesh.mesh.snapshot().nodes[0].load.failed == 0


async def test_when_every_node_fails_the_last_servers_error_is_the_answer() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        for simulated in mesh.hosts.values():
            await simulated.set_faults(Faults(status=500, paths=CHATS))
        answer = await send(mesh.mesh, make_call())
        assert isinstance(answer, WholeAnswer)
        assert (answer.status, answer.attempts) == (500, 2)
        assert "unexpectedly stopped" in json.loads(answer.body)["error"]
        assert (mesh.mesh.request_counters.served, mesh.mesh.request_counters.failed) == (0, 1)
        assert mesh.attempts("a") == mesh.attempts("b") == {Outcome.SERVER_ERROR: 1}


@pytest.mark.slow
async def test_when_no_server_answered_the_error_names_each_nodes_failure() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        for simulated in mesh.hosts.values():
            await simulated.set_faults(Faults(disconnect=True, paths=CHATS))
        with pytest.raises(NoNodeError, match=r"a: no answer.*b: no answer|b: no answer.*a: no answer"):
            await send(mesh.mesh, make_call())
        tried = sum(sum(mesh.attempts(name).values()) for name in mesh.hosts)
        assert 2 <= tried <= 2 * MAX_ROUNDS
        assert mesh.mesh.request_counters.failed == 1
        assert mesh.wait_settled()


async def test_a_busy_node_is_asked_again() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(status=429, paths=CHATS, times=2))
        answer = await send(mesh.mesh, make_call())
        assert await answer.read()
        assert answer.attempts == 3
        assert mesh.attempts("a") == {Outcome.BUSY: 2, Outcome.SERVED: 1}


async def test_all_attempts_have_one_deadline() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(status=500, paths=CHATS))
        await mesh.hosts["b"].set_faults(Faults(hang=True, paths=CHATS))
        with pytest.raises(DeadlineExceeded):
            await send(mesh.mesh, make_call(), timeout_s=0.3)
        assert mesh.attempts("b") == {Outcome.DEADLINE: 1}
        assert mesh.mesh.snapshot().nodes[1].load.failed == 0  # slow is not broken
        assert mesh.mesh.request_counters.failed == 1
        assert mesh.wait_settled()


async def test_a_long_silence_before_the_first_byte_is_no_fault() -> None:
    async with mesh_of_hosts(host("a", prefill_tokens_per_s=10.0), host("b")) as mesh:
        answer = await send(mesh.mesh, make_call())
        assert await answer.read()
        assert (answer.node, answer.attempts) == ("a", 1)


async def test_a_host_that_dies_while_it_reads_the_prompt_is_left_at_once() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(hang=True, paths=CHATS))
        probes = mesh.hosts["a"].counters.http
        sending = asyncio.create_task(send(mesh.mesh, make_call()))
        await wait_until(lambda: mesh.hosts["a"].counters.http > probes, "it is with the server that hangs")
        assert mesh.in_flight() == 1
        await mesh.hosts["a"].set_faults(Faults(refuse=True))
        answer = await sending
        assert await answer.read()
        assert (answer.node, answer.attempts) == ("b", 2)


async def test_a_client_that_leaves_is_no_failure_of_a_node() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(hang=True, paths=CHATS))
        sending = asyncio.create_task(send(mesh.mesh, make_call()))
        await wait_until(lambda: mesh.in_flight() == 1, "it is with the node that hangs")
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert mesh.attempts("a") == {Outcome.CLIENT_GONE: 1}
        assert mesh.attempts("b") == {}
        assert mesh.mesh.request_counters.cancelled == 1
        assert mesh.wait_settled()


async def test_the_time_in_the_queue_is_reported() -> None:
    async with mesh_of_hosts(host("a", slots=1, tokens_per_s=100.0, answer_tokens=(20, 20)), max_parallel=1) as mesh:
        first = await send(mesh.mesh, make_call())
        assert first.queue_ms < 100.0
        second = asyncio.create_task(send(mesh.mesh, make_call()))
        await wait_until(lambda: mesh.mesh.snapshot().gateway.queued == 1, "the second waits")
        await first.read()
        answer = await second
        assert answer.queue_ms > 20.0
        await answer.read()


@pytest.mark.slow
async def test_a_full_queue_refuses_new_requests_but_not_those_that_were_accepted() -> None:
    async with mesh_of_hosts(host("a", slots=1, tokens_per_s=50.0), host("b"), max_parallel=1, max_queue=1) as mesh:
        await mesh.hosts["b"].set_faults(Faults(cut_after_tokens=3))
        holder = await send(mesh.mesh, make_call(), node="a")
        await anext(holder)
        waits = asyncio.create_task(send(mesh.mesh, make_call(), node="a"))
        await wait_until(lambda: mesh.mesh.snapshot().gateway.queued == 1, "a second waits")
        with pytest.raises(QueueFull):
            await send(mesh.mesh, make_call(), node="a")
        answer = await send(mesh.mesh, make_call())  # on b, which will fail it
        reading = asyncio.create_task(answer.read())
        await wait_until(lambda: mesh.mesh.snapshot().gateway.queued == 2, "the rest of an answer waits past the bound")
        await holder.aclose()
        assert text_of(await (await waits).read())
        assert text_of(await reading)
        await wait_until(mesh.wait_settled, "nothing is in flight")


# -- continuing a cut answer ------------------------------------------------------------------------------------------


async def test_how_a_model_continues_is_asked_once_for_the_whole_mesh() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=3))
        await (await send(mesh.mesh, make_call())).read()
        assert mesh.mesh._send_context.strategies == {}, "a rendered prompt is continued, so nothing need be known"
        asked = mesh.hosts["b"].counters.http
        for _ in range(2):
            await (await send(mesh.mesh, make_call("/api/generate", images=["aGk="]))).read()
        assert mesh.mesh._send_context.strategies == {("b", "m"): ContinuationStrategy.ASSISTANT_LAST}
        chats = 2 + 2  # for each answer its rest, and for the first the two questions
        assert mesh.hosts["b"].counters.http - asked == chats


async def test_a_node_that_does_not_say_how_its_model_continues_is_passed_over() -> None:
    async def closes(exchange: Exchange) -> None:
        """Streams one token and dies; cannot render its prompt."""
        if b"_debug_render_only" in exchange.body:
            await exchange.send(whole_response(b"{}", status="404 Gone"))
        elif b"stream" in exchange.body:
            await exchange.send(chunked_head() + chunk(b'{"message":{"content":"x"},"done":false}\n'))
            exchange.close()

    async with (
        serve(ollama_script(closes)) as first,
        serve(ollama_script(closes)) as second,
        mesh_of_nodes(node("a", first.url, weight=100.0), node("b", second.url)) as mesh,
    ):
        answer = await send(mesh.mesh, make_call(stream=True))
        with pytest.raises(StreamCut, match="could not be continued"):
            await answer.read()
        assert Outcome.MODEL_NOT_FOUND in mesh.attempts("b")
        assert mesh.wait_settled()


async def test_a_node_that_refuses_to_continue_is_not_the_end() -> None:
    """A template that allows no last message of the assistant answers 400, which is not the client's fault."""
    refusals = 0

    async def picky(exchange: Exchange) -> None:
        nonlocal refusals
        if b'"assistant"' in exchange.body:
            refusals += b"_debug" not in exchange.body
            await exchange.send(whole_response(b'{"error":"prefill is not supported"}', status="400 Bad Request"))
        else:
            await exchange.send(whole_response(b"{}", status="500 Oops"))

    async with mesh_of_hosts(host("a"), host("c")) as lab, serve(ollama_script(picky)) as server:
        await lab.hosts["a"].set_faults(Faults(cut_after_tokens=4))
        specs = (
            node("a", lab.hosts["a"].url),
            node("b", server.url, weight=0.01),
            node("c", lab.hosts["c"].url, weight=0.0001),
        )
        async with mesh_of_nodes(*specs) as mesh:
            mesh.mesh._send_context.strategies["b", "m"] = ContinuationStrategy.ASSISTANT_LAST
            want = text_of(await (await send(mesh.mesh, make_call(), node="c")).read())
            answer = await send(mesh.mesh, make_call())
            assert text_of(await answer.read()) == want
            assert refusals == 1
            assert answer.node == "c"
            assert mesh.attempts("b") == {Outcome.CLIENT_ERROR: 1}
            assert mesh.mesh.snapshot().nodes[1].load.failed == 0


async def test_the_request_to_continue_has_the_clients_headers() -> None:
    heads: list[bytes] = []

    async def record_head(exchange: Exchange) -> None:
        heads.append(exchange.head)
        await exchange.send(chunked_head() + chunk(b'{"message":{"content":"x"},"done":false}\n'))
        exchange.close()

    async with serve(ollama_script(record_head)) as server, mesh_of_nodes(node("a", server.url)) as mesh:
        mesh.mesh._send_context.strategies["a", "m"] = ContinuationStrategy.ASSISTANT_LAST
        call = make_call()
        call = HttpCall(call.method, call.path, call.body, (*JSON, ("X-Trace", "7")))
        answer = await send(mesh.mesh, call)
        with pytest.raises(StreamCut, match="more than 3 times"):
            await answer.read()
        assert len(heads) == 4
        assert all(b"X-Trace: 7\r\n" in head for head in heads)


@pytest.mark.slow
async def test_servers_of_another_kind_are_not_asked_to_continue() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as lab:
        await lab.hosts["a"].set_faults(Faults(cut_after_tokens=4))
        specs = (
            node("a", lab.hosts["a"].url, weight=100.0),
            node("b", lab.hosts["b"].url, kind=BackendKind.OPENAI),
        )
        async with mesh_of_nodes(*specs) as mesh:
            answer = await send(mesh.mesh, make_call())
            with pytest.raises(StreamCut):
                await answer.read()
            assert mesh.attempts("b") == {}


async def test_the_error_of_a_missing_model_lists_the_models_that_there_are() -> None:
    async with mesh_of_hosts(host("a", models=(ModelProfile("other:1b"),))) as mesh:
        with pytest.raises(ModelMissing) as missing:
            await send(mesh.mesh, make_call())
        assert missing.value.available == ("other:1b",)
        assert mesh.mesh.request_counters.failed == 1
