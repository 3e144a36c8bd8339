"""Stages on a real mesh over stand-ins in this process: what is kept of them, and which way their requests take."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from gpumesh.bench.load.load_sources import LoadOfThisProcess, LoadSource
from gpumesh.bench.load.route_arms import RouteAccess
from gpumesh.bench.load.routes import http_route
from gpumesh.bench.scenarios.base import make_mesh_stage, make_node_stage, make_stage
from gpumesh.bench.stage_runner import StageRunner
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.prompts import PromptFactory
from gpumesh.bench.workload.settings import BenchSettings
from gpumesh.bench.workload.stages import PlannedRequest, StageKind
from gpumesh.topology import BackendKind
from tests.bench.test_run import Heard, Target
from tests.mesh.meshes import MODEL, RunningMesh, host, mesh_of_hosts

PROMPTS = PromptFactory(BenchSettings(MODEL, tokens=16), Random(1))


def runner(made: RunningMesh, load: LoadSource | None = None) -> StageRunner:
    return StageRunner(Target(made.mesh), ["alpha"], Objective(), Heard(), None, RouteAccess(), None, load, model=MODEL)


async def test_a_stage_that_is_measured_again_takes_the_place_of_the_first_try() -> None:
    async with mesh_of_hosts(host("alpha")) as made:
        run = runner(made)
        first, again = make_node_stage(PROMPTS, "alpha", 2, 1), make_node_stage(PROMPTS, "alpha", 3, 1)
        other = make_mesh_stage("mesh", PROMPTS, 1, 1)
        for one in (first, other, replace(again, attempt=2)):
            await run.measure(one)
    assert [(result.name, result.requests) for result in run.results] == [("alpha", 3), ("mesh", 1)]
    labels = [record.stage for record in run.records]
    assert labels == ["alpha"] * 2 + ["mesh"] + ["alpha (try 2)"] * 3, "nothing that was measured is lost"


async def test_a_ramp_is_no_figure_and_can_go_past_the_mesh() -> None:
    """The mesh gives the node two requests at a time, the server runs four."""
    async with mesh_of_hosts(host("alpha", slots=4, tokens_per_s=200.0), max_parallel=2) as made:
        run = runner(made)
        requests = [PlannedRequest(PROMPTS.make_prompt(tokens=100), "alpha") for _ in range(4)]
        stage = make_stage("ramp", StageKind.CAPACITY, requests, 4, node="alpha")
        in_flight = []
        for is_direct in (False, True):
            outcome = await run.measure(replace(stage, direct=is_direct))
            in_flight.append(made.hosts["alpha"].counters.max_in_flight)
        served = made.mesh.request_counters.served
    assert in_flight == [2, 4]
    assert served == 4, "the mesh has seen the first four only"
    assert run.results == []
    assert len(run.records) == 8
    assert [facts.parallel for facts in outcome.before] == [2]


async def test_the_answers_of_a_server_that_does_not_say_its_name_are_those_of_its_stage() -> None:
    async with mesh_of_hosts(host("alpha")) as made, http_route(made.hosts["alpha"].url, BackendKind.OLLAMA) as route:
        run = runner(made, LoadOfThisProcess(lambda request, _: route(request, None)))
        outcome = await run.measure(make_node_stage(PROMPTS, "alpha", 4, 2))
        without_node = await run.measure(make_mesh_stage("mesh", PROMPTS, 1, 1))
    assert [(share.node, share.served) for share in outcome.result.nodes] == [("alpha", 4)]
    assert {record.node for record in run.records} == {"alpha", None}
    assert without_node.result.nodes == ()
