from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from gpumesh.errors import ExecError
from gpumesh.lab.ollama import SimOllama
from gpumesh.mesh.inspection.node_inspection import InspectionReport, inspect_node, merge_report
from gpumesh.probes.http_client import make_http_client
from gpumesh.state import BackendPhase, BackendState, Health, NodeState, RouteState, TunnelPhase, TunnelState
from gpumesh.topology import BackendSpec, NodeSpec, Target
from tests.mesh.meshes import host

ROUTE = RouteState("http://127.0.0.1:1", "http://127.0.0.1:1", "direct")
STATE = NodeState(
    "alpha",
    Health.HEALTHY,
    None,
    TunnelState("direct", TunnelPhase.UP),
    BackendState("ollama", BackendPhase.UP, url=ROUTE.url),
    routes=(ROUTE,),
)


async def test_a_report_has_the_routes_and_the_free_space() -> None:
    async def run_command(argv: Sequence[str]) -> bytes:
        assert argv[0] == "sh"
        return b"Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda1 100000 90000 4096 96% /\n"

    async with SimOllama(host("alpha")) as server, make_http_client() as client:
        route = RouteState(server.url, server.url, "direct")
        state = replace(STATE, routes=(route,), backend=replace(STATE.backend, url=server.url))
        spec = NodeSpec("alpha", BackendSpec(targets=(Target("127.0.0.1", server.port),)))
        report = await inspect_node(client, spec, state, api_key=None, run_command=run_command, timeout_s=20.0)
    (found,) = report.routes
    assert (found.state, report.store_free_mib) == (BackendPhase.UP, 4)
    assert (found.latency_ms or 0) > 0
    assert merge_report(state, report).routes == report.routes
    assert merge_report(state, report).host.store_free_mib == 4


@pytest.mark.parametrize("error", [ExecError("no session"), None])
async def test_a_host_that_runs_no_command_in_time_is_not_known_to_have_space(error: Exception | None) -> None:
    async def run_command(argv: Sequence[str]) -> bytes:
        if error is not None:
            raise error
        await asyncio.Event().wait()
        return b""

    async with make_http_client() as client:
        state = replace(STATE, routes=())
        spec = NodeSpec("alpha", BackendSpec())
        report = await inspect_node(client, spec, state, api_key=None, run_command=run_command, timeout_s=0.05)
    assert report == InspectionReport((), None)


def test_a_report_about_other_urls_is_not_merged() -> None:
    report = InspectionReport((replace(ROUTE, url="http://127.0.0.1:2", state=BackendPhase.UP),), 5)
    assert merge_report(STATE, report) == STATE
    offered = replace(ROUTE, url="http://203.0.113.7:1", offered=True)
    report = InspectionReport((replace(ROUTE, state=BackendPhase.UP), offered), 5)
    merged = merge_report(STATE, report)
    assert merged.routes == report.routes
    assert merge_report(merged, replace(report, store_free_mib=6)).host.store_free_mib == 6, "and again"
