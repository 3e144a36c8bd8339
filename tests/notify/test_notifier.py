"""The notifier on real state changes: what is told to whom, and that a receiver that fails does not hold the others."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path

from gpumesh.daemon.mesh_process import run_mesh
from gpumesh.daemon.shutdown import Shutdown
from gpumesh.lab.ollama import SimOllama
from gpumesh.notify.events import DOWN_FOR_S
from gpumesh.notify.notifier import run_notifier
from gpumesh.state import MeshState
from gpumesh.topology import EventKind, ExpectSpec, NotifyFormat, NotifySpec, Topology
from tests.cli.states import down, healthy, mesh
from tests.daemon.test_mesh_process import paths_in
from tests.mesh.meshes import host, node
from tests.mesh.servers import answer_with, serve
from tests.tunnels.polling import wait_until

OK = answer_with(b"HTTP/1.1 204 No Content\r\n\r\n")


async def test_each_rule_is_told_what_it_wants() -> None:
    state = mesh(down("a"), healthy("b"))
    clock = itertools.count(0.0, DOWN_FOR_S)  # between two looks at the clock, so much time has passed

    async def states() -> AsyncIterator[MeshState]:
        while True:
            yield state
            await asyncio.sleep(0.005)

    async with serve(OK) as every, serve(OK) as only_up:
        rules: tuple[NotifySpec, ...] = (
            NotifySpec(command=("false",), on=frozenset({EventKind.NODE_DOWN})),
            NotifySpec(webhook=every.url, quiet_s=1.0),
            NotifySpec(webhook=only_up.url, on=frozenset({EventKind.NODE_UP})),
        )
        running = asyncio.create_task(run_notifier(lambda: rules, states(), clock=lambda: next(clock)))
        await wait_until(lambda: len(every.requests) == 1, "the first message")
        state = mesh(healthy("a"), healthy("b"))
        await wait_until(lambda: len(every.requests) == 2 and len(only_up.requests) == 1, "the second message")
        rules = (NotifySpec(webhook=every.url, quiet_s=2.0, format=NotifyFormat.SLACK),)  # mesh.yaml was changed
        await asyncio.sleep(0.02)
        state = mesh(down("a"), healthy("b"))
        await wait_until(lambda: len(every.requests) == 3, "the message by the new rule")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        texts = [json.loads(request.body)["text"] for request in every.requests]
        assert texts[0].startswith("home: a is down: nothing listens")
        assert texts[1] == "home: a is back"
        assert texts[2].startswith("home: a is down: nothing listens")
        assert [json.loads(request.body)["text"] for request in only_up.requests] == ["home: a is back"]


async def test_a_running_mesh_tells_what_its_probes_find(tmp_path: Path) -> None:
    async with SimOllama(host("a")) as server, serve(OK) as hook:
        spec = node("a", server.url)
        spec = type(spec)(spec.name, spec.backend, expect=ExpectSpec(models=("not-there",)))
        topology = Topology("home", (spec,), notify=(NotifySpec(webhook=hook.url),))
        async with run_mesh(topology, paths_in(tmp_path), gateway=False, shutdown=Shutdown()):
            await wait_until(lambda: bool(hook.requests), "the message")
        document = json.loads(hook.requests[0].body)
    assert [(event["kind"], event["node"]) for event in document["events"]] == [("model-missing", "a")]
