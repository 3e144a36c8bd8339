"""A streaming answer whose node is lost, over real sockets: cut in every manner, and continued by another node."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import StreamCut
from gpumesh.lab.profile import Faults
from tests.mesh.meshes import (
    BODIES,
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
from tests.mesh.requests.streams import FAULTS, FRAME, send_and_cut, uncut_text
from tests.mesh.servers import Exchange, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until

TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.slow] if name == "stall" else []) for name in FAULTS]
)
async def test_a_cut_answer_is_continued_by_another_node_and_reads_as_if_uncut(
    fault: str, continues: bool, impatient: None
) -> None:
    async with mesh_of_hosts(host("a", continues=continues), host("b", continues=continues)) as mesh:
        for path in BODIES:
            uncut = await uncut_text(mesh, path)
            answer, data = await send_and_cut(mesh, path, FAULTS[fault], uncut)
            last = frames(data)[-1]
            assert last["gpumesh"] == {"continued": 1, "tokens_before": 7}
            assert (last["usage"]["completion_tokens"] if "usage" in last else last["eval_count"]) == 40
            assert answer.counters is not None
            assert answer.counters.tokens == 40
        outcome = {"error line": Outcome.STREAM_ERROR, "stall": Outcome.TIMED_OUT}.get(fault, Outcome.CUT)
        failed = mesh.attempts("a")[outcome]
        assert failed == (
            2 if fault == "error line" else 3
        )  # of /v1 Ollama loses the error text, and the stream just ends
        await wait_until(mesh.wait_settled, "nothing is in flight")
        assert (mesh.mesh.request_counters.served, mesh.mesh.request_counters.failed) == (6, 0)


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
@pytest.mark.parametrize("tokens", [0, 1, 39, 40])
async def test_an_answer_cut_at_its_first_or_last_token_is_continued(tokens: int, continues: bool) -> None:
    async with mesh_of_hosts(host("a", continues=continues), host("b", continues=continues)) as mesh:
        for path in BODIES:
            uncut = await uncut_text(mesh, path)
            await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=tokens))
            answer = await send(mesh.mesh, make_call(path))
            data = await answer.read()
            await mesh.hosts["a"].set_faults(Faults())
            assert text_of(data) == uncut
            assert count_final_frames(data) == 1
            assert (answer.node, answer.attempts) == ("b", 2)


async def test_thinking_is_not_lost_with_its_node() -> None:
    async with mesh_of_hosts(host("a", thinking=True), host("b", thinking=True)) as mesh:
        uncut = await uncut_text(mesh, "/api/chat")
        _, data = await send_and_cut(mesh, "/api/chat", Faults(cut_after_tokens=20), uncut)
        assert "".join(frame["message"].get("thinking", "") for frame in frames(data))


async def test_the_only_node_continues_its_own_answer() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        uncut = await uncut_text(mesh, "/api/chat")
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=9, times=2))
        answer = await send(mesh.mesh, make_call())
        assert text_of(await answer.read()) == uncut
        assert (answer.node, answer.attempts, answer.continuations) == ("a", 3, 2)


@pytest.mark.slow
async def test_an_answer_is_continued_when_its_only_node_has_restarted() -> None:
    async with mesh_of_hosts(host("a", tokens_per_s=100.0)) as mesh:
        uncut = await uncut_text(mesh, "/api/chat")
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
        assert text_of(data) == uncut


async def test_a_node_that_fails_before_it_continues_is_passed_over() -> None:
    async with mesh_of_hosts(host("a"), host("b"), host("c")) as mesh:
        uncut = await uncut_text(mesh, "/api/chat")
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=5))
        await mesh.hosts["b"].set_faults(Faults(status=500, paths=("/api/chat",)))
        answer = await send(mesh.mesh, make_call())
        assert text_of(await answer.read()) == uncut
        assert answer.node == "c"
        assert mesh.attempts("b") == {Outcome.SERVER_ERROR: 1}


async def test_after_too_many_cuts_the_answer_ends_with_an_error() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        for sim in mesh.hosts.values():
            await sim.set_faults(Faults(cut_after_tokens=2))
        answer = await send(mesh.mesh, make_call())
        with pytest.raises(StreamCut, match="more than 3 times"):
            await answer.read()
        assert answer.continuations == 3
        assert answer.outcome is Outcome.CUT
        assert (mesh.mesh.request_counters.served, mesh.mesh.request_counters.failed) == (0, 1)
        assert mesh.wait_settled()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "messages": [{"role": "tool", "content": "5"}],
            },
            "`tools`",
        ),
        ({"format": "json"}, "`format`"),
    ],
)
async def test_what_cannot_be_continued_rightly_ends_with_words(more: dict[str, Any], reason: str) -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=1))
        answer = await send(mesh.mesh, make_call(**more))
        with pytest.raises(StreamCut, match=reason) as failed:
            await answer.read()
        assert json.loads(answer.error_frame(failed.value.message) or b"")["error"] == failed.value.message
        assert mesh.attempts("b") == {}
        assert mesh.wait_settled()


async def test_the_client_may_forbid_continuing() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=3))
        answer = await send(mesh.mesh, make_call(), resume=False)
        with pytest.raises(StreamCut, match="asked for no continuation"):
            await answer.read()
        assert mesh.attempts("b") == {}


async def test_an_answer_ends_with_an_error_when_no_node_is_left() -> None:
    async def fails_after_one(exchange: Exchange) -> None:
        if len([request for request in server.requests if b"POST" in request.head]) == 1:
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
