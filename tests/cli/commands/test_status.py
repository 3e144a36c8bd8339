from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from gpumesh.cli.commands.status import health_exit_code, parse_sort_key
from gpumesh.cli.first_report import FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.views.node_selection import SortKey
from gpumesh.errors import ExitCode
from gpumesh.lab.profile import Faults, SmiMode
from gpumesh.state import Finding, Health, MeshState, Severity
from gpumesh.topology import SshSpec
from tests.cli.meshes import SimulatedMesh, quick_host, simulated_mesh
from tests.cli.states import down, healthy, mesh, typical
from tests.real.command import Gpumesh

pytestmark = [pytest.mark.slow]

INFO = Finding("persistence-off", Severity.INFO, "a", "x")
WARNING = Finding("same-gpu", Severity.WARNING, "a", "x")


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (mesh(healthy("a")), ExitCode.OK),
        (mesh(healthy("a"), replace(healthy("b"), health=Health.DRAINING)), ExitCode.OK),
        (mesh(healthy("a"), findings=(INFO,)), ExitCode.OK),
        (mesh(healthy("a"), findings=(WARNING,)), ExitCode.DEGRADED),
        (mesh(healthy("a"), down("b")), ExitCode.DEGRADED),
        (mesh(replace(healthy("a"), health=Health.DEGRADED)), ExitCode.DEGRADED),
        (mesh(down("a")), ExitCode.NO_NODE),
        (mesh(replace(healthy("a"), health=Health.DRAINING)), ExitCode.NO_NODE),
        (mesh(replace(healthy("a"), health=Health.UNKNOWN)), ExitCode.NO_NODE),
        (typical(), ExitCode.DEGRADED),
    ],
)
def test_check(state: MeshState, code: ExitCode) -> None:
    assert health_exit_code(state) == code


def test_tables_begin_with_the_unhealthy_nodes_and_programs_get_the_order_of_the_file() -> None:
    assert parse_sort_key(None, is_table=True) is SortKey.TROUBLE
    assert parse_sort_key(None, is_table=False) is SortKey.CONFIG
    assert parse_sort_key("config", is_table=True) is SortKey.CONFIG


async def test_of_a_mesh_that_runs(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    two.write([two.node("alpha", labels={"site": "home"}), two.node("beta")])
    await gpumesh("up", "-d")
    table = await gpumesh("status")
    assert table.err == ""
    for part in ("tested", "simulated hosts", "● alpha", "● beta", "RTX 4090", "2 of 2 nodes up · 2 GPUs"):
        assert part in table.out
    assert "\x1b" not in table.out
    assert (await gpumesh("status", "--check", "--quiet")).out == ""

    document = (await gpumesh("status", "--json", "--label", "site=home")).json()
    assert [node["name"] for node in document["nodes"]] == ["alpha"]
    assert document["totals"]["gpus"] == 1
    assert "beta" not in (await gpumesh("status", "-n", "a*")).out
    order = (await gpumesh("status", "--json", "--sort", "name", "-n", "*")).json()
    assert [node["name"] for node in order["nodes"]] == ["alpha", "beta"]

    for arguments, said in [
        (("-n", "gamma"), "no node 'gamma'"),
        (("-l", "site=away"), "no node has site=away"),
        (("--sort", "size"), "--sort 'size' is none of: trouble, config, name,"),
    ]:
        ended = await gpumesh("status", *arguments, code=2)
        assert said in ended.err
        assert ended.out == ""

    await gpumesh("drain", "alpha")
    assert "‖ alpha" in (await gpumesh("status")).out
    await gpumesh("status", "--check", "-q")
    await two.hosts["beta"].set_faults(Faults(refuse=True))
    await gpumesh("resume", "alpha")
    await two.hosts["alpha"].set_faults(Faults(nvidia_smi=SmiMode.NO_DRIVER))
    await gpumesh("down")
    ended = await gpumesh("status", "--check", code=3)
    assert "driver broken" in ended.out
    assert "modprobe nvidia" in ended.out
    assert "✗ beta" in ended.out


async def test_nothing_works_and_the_truth_is_told_all_the_same(direct: SimulatedMesh) -> None:
    for host in direct.hosts.values():
        await host.set_faults(Faults(refuse=True))
    ended = await direct.gpumesh("status")
    assert "0 of 2 nodes up" in ended.out
    assert ended.out.count("✗") >= 2
    assert (await direct.gpumesh("status", "--check", "-q", code=4)).out == ""


async def test_a_host_that_says_nothing_delays_nobody_for_long(gpumesh: Gpumesh) -> None:
    async with simulated_mesh(gpumesh, quick_host("good"), quick_host("silent")) as made:
        await made.hosts["silent"].set_faults(Faults(ssh_hang=True))
        nodes = [made.node("good"), made.node("silent")]
        nodes[1]["ssh"]["connect_timeout"] = "3s"
        made.write(nodes)
        ended = await gpumesh("status")
        assert ended.wall_s < 12
        assert "● good" in ended.out
        assert "✗ silent" in ended.out


async def test_what_a_host_says_is_not_obeyed_by_a_terminal(gpumesh: Gpumesh) -> None:
    async with simulated_mesh(gpumesh, quick_host("evil")) as made:
        await made.hosts["evil"].set_faults(Faults(nvidia_smi=SmiMode.ESCAPES))
        async with gpumesh.terminal("status", "-v") as shown:
            assert await shown.wait_exit() == 0
            await shown.wait_for_text("no process is seen")
            written = shown.written
        piped = await gpumesh("status", "-v")
        document = await gpumesh("status", "--json")
    assert "evil" in written
    ours = written
    for style in ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[1;2m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[36m"):
        ours = ours.replace(style, "")
    assert "\x1b" not in ours, "only colours, and those are ours"
    assert "\x07" not in ours
    assert "\x1b" not in piped.out
    assert "\x1b" not in document.out
    assert json.loads(document.out)["nodes"][0]["gpus"]


async def test_colours_only_on_terminals_and_never_with_no_color(direct: SimulatedMesh) -> None:
    async with direct.gpumesh.terminal("status") as coloured:
        assert await coloured.wait_exit() == 0
        await coloured.wait_for_text("nodes up")
        assert "\x1b[32m" in coloured.written
    async with direct.gpumesh.terminal("status", NO_COLOR="1") as plain:
        assert await plain.wait_exit() == 0
        await plain.wait_for_text("nodes up")
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]", plain.written)


async def test_watch_into_a_pipe_prints_a_table_for_each_change(direct: SimulatedMesh) -> None:
    async with direct.gpumesh.started("status", "-w", "--interval", "0.1") as process:
        assert process.stdout is not None
        seen = b""
        while seen.count(b"nodes up") < 3:
            seen += await process.stdout.readline()
        process.stdout.feed_eof()
    assert b"\x1b" not in seen


def test_a_host_that_does_not_answer_is_given_up_before_status_stops_waiting() -> None:
    """Otherwise a probe without a running mesh shows such a host as unknown. Starting its process takes time, too."""
    assert SshSpec(host="gpu").connect_timeout_s + 1.0 <= FIRST_REPORT_TIMEOUT_S
