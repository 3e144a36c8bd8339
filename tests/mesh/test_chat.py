"""A chat through the mesh: chunks of text, whatever the server's kind and whatever happens to it on the way."""

from __future__ import annotations

import pytest

from gpumesh.backends.base import ChatRequest, Message
from gpumesh.errors import BackendStatus, ModelMissing, StreamCut
from gpumesh.lab.profile import Faults
from gpumesh.mesh.chat import ChatStream
from gpumesh.topology import BackendKind
from tests.mesh.meshes import host, mesh_of_hosts, mesh_of_nodes, node
from tests.tunnels.polling import wait_until


async def text_of(stream: ChatStream) -> str:
    return "".join([chunk.text async for chunk in stream])


async def test_chunks_come_with_the_node_and_the_counters_known() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        stream = mesh.mesh.chat("m", "Wie groß?")
        assert (stream.node, stream.attempts, stream.queue_ms) == (None, 0, 0.0)
        chunks = [chunk async for chunk in stream]
        assert len([chunk for chunk in chunks if chunk.text]) == 40
        assert [chunk.done for chunk in chunks].count(True) == 1
        assert chunks[-1].done_reason == "stop"
        assert (stream.node, stream.attempts) == ("a", 1)
        assert stream.counters is not None
        assert stream.counters.tokens == 40


async def test_the_next_turn_of_a_conversation_goes_to_the_node_that_has_its_beginning() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as lab:
        specs = [node(name, lab.hosts[name].url) for name in "ab"]  # equally good, so they take turns
        async with mesh_of_nodes(*specs) as mesh:
            nodes = set()
            for number in range(4):
                turns: list[Message] = []
                served_by = []
                for question in ("text " * 1000, "And then?", "And then?"):
                    turns.append(Message("user", f"{number} {question}"))
                    stream = mesh.mesh.chat(ChatRequest("m:latest", tuple(turns)), session=f"conversation {number}")
                    turns.append(Message("assistant", await text_of(stream)))
                    served_by.append(stream.node)
                assert len(set(served_by)) == 1
                nodes.update(served_by)
            assert nodes == {"a", "b"}


# The stand-in is an Ollama: it has the API of these kinds.
KINDS = (BackendKind.AUTO, BackendKind.OLLAMA, BackendKind.OPENAI)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_every_kind_of_server(kind: BackendKind, stream: bool) -> None:
    async with mesh_of_hosts(host("a")) as lab:
        request = ChatRequest(
            "m:latest", (Message("system", "Be brief."), Message("user", "Hi")), {"seed": 3}, stream=stream
        )
        want = await text_of(lab.mesh.chat(request))
        async with mesh_of_nodes(node("x", lab.hosts["a"].url, kind=kind)) as mesh:
            answer = mesh.mesh.chat(request)
            assert await text_of(answer) == want
            assert answer.counters is not None
            assert answer.counters.tokens == 40


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cut_answer_reads_as_if_it_was_never_cut(kind: BackendKind) -> None:
    async with mesh_of_hosts(host("a"), host("b")) as lab:
        specs = (
            node("a", lab.hosts["a"].url, weight=100.0, kind=kind),
            node("b", lab.hosts["b"].url, weight=1.0, kind=kind),
        )
        # Another mesh than the one that is tested, which would prefer b if the answer of a came slowly.
        want = await text_of(lab.mesh.chat("m:latest", "Wie groß?"))
        await lab.hosts["a"].set_faults(Faults(cut_after_tokens=11))
        async with mesh_of_nodes(*specs) as mesh:
            stream = mesh.mesh.chat("m:latest", "Wie groß?", node=None)
            assert await text_of(stream) == want
            assert (stream.node, stream.attempts) == ("b", 2)
            assert stream.counters is not None
            assert stream.counters.tokens == 40


async def test_an_answer_that_may_not_be_continued_ends_with_an_error_after_what_came() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(cut_after_tokens=4))
        stream = mesh.mesh.chat("m", "Wie groß?", resume=False)
        received = [await anext(stream) for _ in range(4)]
        assert all(chunk.text for chunk in received)
        with pytest.raises(StreamCut):
            await anext(stream)
        assert mesh.wait_settled()


async def test_leaving_the_stream_early_stops_the_generation() -> None:
    async with mesh_of_hosts(host("a", tokens_per_s=50.0)) as mesh:
        async with mesh.mesh.chat("m", "Wie groß?") as stream:
            await anext(stream)
        await wait_until(lambda: mesh.hosts["a"].counters.cancelled == 1, "the host stops")
        assert mesh.mesh.request_counters.cancelled == 1


async def test_a_refusal_has_the_servers_error_message() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        request = ChatRequest("m", (Message("user", "x"),), think=True)
        with pytest.raises(BackendStatus, match="does not support thinking") as refused:
            await text_of(mesh.mesh.chat(request))
        assert (refused.value.status, refused.value.node) == (400, "a")


async def test_a_model_that_is_listed_and_gone_is_missing() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        mesh.hosts["a"].engine.store.clear()
        with pytest.raises(ModelMissing) as missing:
            await text_of(mesh.mesh.chat("m", "x"))
        assert "a says:" in (missing.value.hint or "")


async def test_closing_a_stream_that_never_began_is_harmless() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        stream = mesh.mesh.chat("m", "x")
        await stream.aclose()
        assert mesh.mesh.request_counters.accepted == 0


async def test_repr_tells_the_state() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        stream = mesh.mesh.chat("m", "x")
        assert repr(stream) == "<ChatStream m not started>"
        await anext(stream)
        assert repr(stream) == "<ChatStream m from a>"
        async for _ in stream:
            pass
        assert repr(stream) == "<ChatStream m ended>"
