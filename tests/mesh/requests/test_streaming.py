"""An answer under way, over real sockets: cut in every manner, silent, late, left, and read slowly."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest

from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import DeadlineExceeded, StreamCut
from gpumesh.lab.profile import Faults
from gpumesh.mesh.requests import silence_watch, streaming
from gpumesh.mesh.requests.answer import Answer
from tests.mesh.meshes import (
    BODIES,
    RunningMesh,
    count_final_frames,
    frames,
    host,
    make_call,
    mesh_of_hosts,
    mesh_of_nodes,
    node,
    ollama_script,
    send,
    text_of,
)
from tests.mesh.servers import LAST_CHUNK, Exchange, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until

FRAME = b'{"message":{"content":" x"},"done":false}\n'
FINAL = b'{"message":{"content":""},"done":true,"done_reason":"stop","eval_count":5,"eval_duration":1000000}\n'
TOOL = {"type": "function", "function": {"name": "f"}}
FAULTS = {
    "reset": Faults(cut_after_tokens=7),
    "silent end": Faults(end_after_tokens=7),
    "error line": Faults(error_line_after_tokens=7),
    "stall": Faults(stall_after_tokens=7),
}


PATIENCE_S = 1.0  # more than what a busy machine may hold up a token


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence_watch, "MIN_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(silence_watch, "PAUSE_FACTOR", 1.0)


async def said(running: RunningMesh, path: str) -> str:
    """The text as it is without any fault."""
    return text_of(await (await send(running.mesh, make_call(path))).read())


async def continued(running: RunningMesh, path: str, faults: Faults, want: str) -> tuple[Answer, bytes]:
    await running.hosts["a"].set_faults(faults)
    answer = await send(running.mesh, make_call(path))
    assert answer.node == "a"
    data = await answer.read()
    await running.hosts["a"].set_faults(Faults())
    assert text_of(data) == want
    assert count_final_frames(data) == 1
    assert (answer.node, answer.attempts, answer.continuations) == ("b", 2, 1)
    assert answer.outcome is Outcome.SERVED
    return answer, data


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.slow] if name == "stall" else []) for name in FAULTS]
)
async def test_a_cut_answer_is_continued_elsewhere_and_reads_as_if_it_never_was(
    fault: str, continues: bool, impatient: None
) -> None:
    async with mesh_of_hosts(host("a", continues=continues), host("b", continues=continues)) as mesh:
        for path in BODIES:
            want = await said(mesh, path)
            answer, data = await continued(mesh, path, FAULTS[fault], want)
            last = frames(data)[-1]
            assert last["gpumesh"] == {"continued": 1, "tokens_before": 7}
            assert (last["usage"]["completion_tokens"] if "usage" in last else last["eval_count"]) == 40
            assert answer.counters is not None
            assert answer.counters.tokens == 40
        outcome = {"error line": Outcome.STREAM_ERROR, "stall": Outcome.TIMED_OUT}.get(fault, Outcome.CUT)
        failed = mesh.attempts("a")[outcome]
        assert failed == (2 if fault == "error line" else 3)  # of /v1 Ollama loses the words, and the stream just ends
        await wait_until(mesh.wait_settled, "nothing is in flight")
        assert (mesh.mesh.request_counters.served, mesh.mesh.request_counters.failed) == (6, 0)


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
@pytest.mark.parametrize("tokens", [0, 1, 39, 40])
async def test_cut_at_its_first_and_its_last_token(tokens: int, continues: bool) -> None:
    async with mesh_of_hosts(host("a", continues=continues), host("b", continues=continues)) as mesh:
        for path in BODIES:
            want = await said(mesh, path)
            await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=tokens))
            answer = await send(mesh.mesh, make_call(path))
            data = await answer.read()
            await mesh.hosts["a"].set_faults(Faults())
            assert text_of(data) == want
            assert count_final_frames(data) == 1
            assert (answer.node, answer.attempts) == ("b", 2)


async def test_thoughts_are_not_lost_with_the_node_that_had_them() -> None:
    async with mesh_of_hosts(host("a", thinking=True), host("b", thinking=True)) as mesh:
        want = await said(mesh, "/api/chat")
        _, data = await continued(mesh, "/api/chat", Faults(cut_after_tokens=20), want)
        assert "".join(frame["message"].get("thinking", "") for frame in frames(data))


async def test_it_goes_back_to_the_only_node_there_is() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        want = await said(mesh, "/api/chat")
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=9, times=2))
        answer = await send(mesh.mesh, make_call())
        assert text_of(await answer.read()) == want
        assert (answer.node, answer.attempts, answer.continuations) == ("a", 3, 2)


@pytest.mark.slow
async def test_it_is_continued_while_the_first_node_restarts() -> None:
    async with mesh_of_hosts(host("a", tokens_per_s=100.0)) as mesh:
        want = await said(mesh, "/api/chat")
        answer = await send(mesh.mesh, make_call())
        data = await anext(answer)
        await mesh.hosts["a"].set_faults(Faults(refuse=True))

        async def come_back() -> None:
            await wait_until(
                lambda: mesh.mesh.snapshot().nodes[0].tunnel.state == "backoff", "the node is seen to be gone"
            )
            await mesh.hosts["a"].set_faults(Faults())

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(come_back())
            data += await answer.read()
        assert text_of(data) == want


async def test_a_node_that_fails_the_rest_before_its_first_byte_is_passed_over() -> None:
    async with mesh_of_hosts(host("a"), host("b"), host("c")) as mesh:
        want = await said(mesh, "/api/chat")
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=5))
        await mesh.hosts["b"].set_faults(Faults(status=500, paths=("/api/chat",)))
        answer = await send(mesh.mesh, make_call())
        assert text_of(await answer.read()) == want
        assert answer.node == "c"
        assert mesh.attempts("b") == {Outcome.SERVER_ERROR: 1}


async def test_after_too_many_cuts_there_is_an_explicit_end() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        for one in mesh.hosts.values():
            await one.set_faults(Faults(cut_after_tokens=2))
        answer = await send(mesh.mesh, make_call())
        with pytest.raises(StreamCut, match="more than 3 times"):
            await answer.read()
        assert answer.continuations == 3
        assert answer.outcome is Outcome.CUT
        assert (mesh.mesh.request_counters.served, mesh.mesh.request_counters.failed) == (0, 1)
        assert mesh.wait_settled()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tools": [TOOL], "messages": [{"role": "tool", "content": "5"}]}, "`tools`"),
        ({"format": "json"}, "`format`"),
    ],
)
async def test_what_cannot_be_continued_rightly_ends_with_words(more: dict[str, Any], words: str) -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=1))
        answer = await send(mesh.mesh, make_call(**more))
        with pytest.raises(StreamCut, match=words) as failed:
            await answer.read()
        assert json.loads(answer.error_frame(failed.value.message) or b"")["error"] == failed.value.message
        assert mesh.attempts("b") == {}
        assert mesh.wait_settled()


async def test_the_client_may_forbid_it() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=3))
        answer = await send(mesh.mesh, make_call(), resume=False)
        with pytest.raises(StreamCut, match="asked for no continuation"):
            await answer.read()
        assert mesh.attempts("b") == {}


async def test_nobody_left_to_go_on() -> None:
    async def fails_after_one(exchange: Exchange) -> None:
        if len([one for one in server.requests if b"POST" in one.head]) == 1:
            await exchange.send(chunked_head() + chunk(FRAME))
            exchange.close()
        else:
            await exchange.send(whole_response(b'{"error":"no memory"}', status="500 Oops"))

    async with serve(ollama_script(fails_after_one)) as server, mesh_of_nodes(node("a", server.url)) as mesh:
        answer = await send(mesh.mesh, make_call())
        with pytest.raises(
            StreamCut, match=r"could not be continued: every node .* has failed it \(a: it answered 500"
        ):
            await answer.read()
        assert mesh.mesh.request_counters.failed == 1
        assert mesh.wait_settled()


# -- silence ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_silent_node_is_waited_for_where_there_is_no_other(impatient: None) -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        want = await said(mesh, "/api/chat")
        await mesh.hosts["a"].set_faults(Faults(stall_after_tokens=5))
        answer = await send(mesh.mesh, make_call())
        data = await anext(answer)

        async def lift() -> None:
            await asyncio.sleep(2.5 * PATIENCE_S)
            await mesh.hosts["a"].set_faults(Faults())

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(lift())
            data += await answer.read()
        assert text_of(data) == want
        assert (answer.attempts, answer.continuations) == (1, 0)


async def test_the_pace_of_a_node_is_learned_from_whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence_watch, "MIN_TIMEOUT_S", 0.0)
    async with mesh_of_hosts(host("a", tokens_per_s=20.0, answer_tokens=(8, 8))) as mesh:
        await said(mesh, "/api/chat")
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


async def test_the_deadline_holds_while_another_node_is_looked_for() -> None:
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


async def test_a_client_that_leaves_while_another_node_is_looked_for() -> None:
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


async def test_the_place_is_free_as_soon_as_the_final_frame_was_seen() -> None:
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


async def test_a_lost_way_is_noticed_in_mid_answer() -> None:
    async with mesh_of_hosts(host("a", tokens_per_s=50.0), host("b")) as mesh:
        want = text_of(await (await send(mesh.mesh, make_call(), node="b")).read())
        answer = await send(mesh.mesh, make_call())
        data = await anext(answer)
        mesh.mesh.fleet["a"].ledger.abort_all_attempts()  # as its tunnel's end would
        data += await answer.read()
        assert text_of(data) == want
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
        await said(mesh, "/api/chat")
        assert reasons == []
        await continued(mesh, "/api/chat", Faults(cut_after_tokens=3), await said(mesh, "/api/chat"))
        assert len(reasons) == 1
        load = next(state.load for state in mesh.mesh.snapshot().nodes if state.name == "a")
        assert load.failed == 1
