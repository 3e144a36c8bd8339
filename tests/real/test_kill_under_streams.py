"""A node dies under 64 streams, in each of three ways and at each of 21 moments: every client gets the very text that
it would have got, and no request fails.

The hosts are the lab's: processes of their own behind real SSH, whose text follows from the prompt alone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from gpumesh import config
from gpumesh.gateway.app import Gateway
from gpumesh.lab import profile
from gpumesh.lab.lab import Lab, LabHost
from gpumesh.lab.profile import Faults, ModelProfile
from gpumesh.mesh.mesh import Mesh
from tests.tunnels.polling import wait_until

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]

STREAMS = 64
TOKENS = 12
# An answer takes one and a half seconds, so that a node can die at any moment of it. Two busy cores carry 64 streams at
# this rate through three SSH servers and their tunnels.
RATE = 8.0
VICTIM = "one"
# Shares of all tokens that have come when it happens: right at the start, all through, and when most are done.
MOMENTS = (0.0, 0.02, 0.2, 0.4, 0.6, 0.8, 0.95)


def hosts() -> list[profile.HostProfile]:
    return [
        profile.make_host(
            name,
            models=(ModelProfile("m:latest", continues=continues, resident=True),),
            tokens_per_s=RATE,
            prefill_tokens_per_s=None,
            load_s=0.0,
            slots=STREAMS,
            answer_tokens=(TOKENS, TOKENS),
        )
        # Two names for one model whose templates differ: each node is asked how it goes on.
        for name, continues in ((VICTIM, True), ("two", True), ("three", False))
    ]


@dataclass
class Streams:
    """As many clients at once, of all three kinds. ``tokens`` counts what has come for all of them."""

    http: aiohttp.ClientSession
    url: str
    tokens: int = 0
    continued: int = 0
    nodes: set[str] = field(default_factory=set)

    def all(self) -> asyncio.Future[list[str]]:
        """Starts them."""
        self.tokens = 0
        return asyncio.gather(*(self._one(number) for number in range(STREAMS)))

    async def _one(self, number: int) -> str:
        prompt = f"Question {number}: why?"
        chat: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
        path, body = (
            ("/api/chat", chat),
            ("/api/generate", {"model": "m", "prompt": prompt}),
            ("/v1/chat/completions", {**chat, "stream": True, "stream_options": {"include_usage": True}}),
        )[number % 3]
        said, ends = [], 0
        async with self.http.post(self.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            self.nodes.add(response.headers["X-GPUMesh-Node"])
            async for line in response.content:
                data = line.strip().removeprefix(b"data: ")
                if not data:
                    continue
                if data == b"[DONE]":
                    ends += 1
                    continue
                frame = json.loads(data)
                assert "error" not in frame, frame
                ends += frame.get("done") is True
                self.continued += "gpumesh" in frame and ("usage" in frame or "eval_count" in frame)
                text = _text(frame)
                if text:
                    said.append(text)
                    self.tokens += 1
        assert ends == 1, f"{ends} final frames"
        return "".join(said)


def _text(frame: dict[str, Any]) -> str:
    if "message" in frame:
        return str(frame["message"]["content"])
    if "response" in frame:
        return str(frame["response"])
    return str(frame["choices"][0]["delta"].get("content", "")) if frame["choices"] else ""


@dataclass
class Stage:
    lab: Lab
    mesh: Mesh
    http: aiohttp.ClientSession
    url: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    folder = tmp_path_factory.mktemp("lab")
    async with Lab(hosts(), folder) as lab:
        nodes = [
            host.node_entry(backend={**host.node_entry()["backend"], "max_parallel": STREAMS})
            for host in lab.hosts.values()
        ]
        spread = {"policy": "least-loaded"}
        topology = config.load(lab.write_config(folder / "mesh.yaml", nodes=nodes, gateway=spread))
        async with Mesh(topology) as mesh, Gateway(mesh) as gateway:
            await wait_until(lambda: len(mesh.usable_nodes()) == 3, "all three hosts are usable")
            timeout = aiohttp.ClientTimeout(total=120.0)
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
                yield Stage(lab, mesh, http, gateway.url)


@dataclass(frozen=True)
class Death:
    strike: Callable[[LabHost], Awaitable[None]]
    lift: Callable[[LabHost], Awaitable[None]]


async def _freeze(host: LabHost) -> None:
    host.freeze()


async def _thaw(host: LabHost) -> None:
    host.thaw()


DEATHS = {
    "killed": Death(LabHost.kill, LabHost.restart),  # its connections are reset, its SSH port refuses
    "black hole": Death(_freeze, _thaw),  # everything stays open and nothing ever answers
    "backend gone": Death(  # SSH stays up, the server behind it is reset and its port refuses
        lambda host: host.set_faults(Faults(refuse=True)), lambda host: host.set_faults(Faults())
    ),
}


@pytest.mark.parametrize("death", DEATHS)
async def test_no_stream_is_cut_and_no_text_is_lost_or_repeated(death: str, stage: Stage) -> None:
    victim, how, streams = stage.lab.host(VICTIM), DEATHS[death], Streams(stage.http, stage.url)
    accepted = stage.mesh.request_counters.accepted  # in the tests before this one
    want = await streams.all()
    assert streams.nodes == {"one", "two", "three"}
    assert streams.continued == 0
    for moment in MOMENTS:
        before = streams.continued
        asking = streams.all()
        try:
            await wait_until(lambda: streams.tokens >= moment * STREAMS * TOKENS, f"{moment:.0%} have come")  # noqa: B023
            await how.strike(victim)
            got = await asking
        finally:
            asking.cancel()
            await how.lift(victim)
        wrong = [(said, right) for said, right in zip(got, want, strict=True) if said != right]
        assert wrong == [], f"at {moment:.0%}"
        if 0.1 < moment < 0.9:
            assert streams.continued > before, f"at {moment:.0%} no stream was on the victim"
        stage.mesh.tunnel(VICTIM).retry_now()  # one that dies so often is otherwise left alone for longer each time
        await wait_until(lambda: len(stage.mesh.usable_nodes()) == 3, "the victim is back")
    books = stage.mesh.request_counters
    assert (books.served, books.failed, books.cancelled) == (books.accepted, 0, 0)
    assert books.accepted - accepted == STREAMS * (1 + len(MOMENTS))
    await wait_until(lambda: all(node.load.in_flight == 0 for node in stage.mesh.snapshot().nodes), "no place is held")
