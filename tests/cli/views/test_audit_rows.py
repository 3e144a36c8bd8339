from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh import audit, errors
from gpumesh.cli.views.audit_rows import (
    AS_EXPECTED,
    ComparisonRow,
    MachineBranch,
    RouteLine,
    compare_nodes,
    describe_route,
    draw_topology,
)
from gpumesh.cli.views.figures import UNKNOWN
from gpumesh.state import BackendPhase, BackendState, HostState, NodeState, Severity
from gpumesh.topology import AddressCommand, ExpectSpec, NodeSpec, SshSpec
from tests.audit.build import (
    GPU,
    OTHER,
    backend,
    direct,
    route,
    spec,
    state,
    state_with_error,
    state_with_routes,
    state_with_smi_output,
    topology,
    without_gpus,
)
from tests.probes.shell_host import row


def compare(*pairs: tuple[NodeSpec, NodeState | None]) -> list[ComparisonRow]:
    made = topology(*(one for one, _ in pairs))
    states = [replace(each, name=one.name) for one, each in pairs if each is not None]
    return list(compare_nodes(made, states, audit.collect_findings(made, states)))


def test_a_node_as_expected() -> None:
    found = compare((spec(), state()))
    assert [(one.name, one.expected, one.found) for one in found] == [
        ("route", "ssh root@203.0.113.7:13323", "up, 41 ms"),
        ("server", "http://127.0.0.1:80", "ollama 0.12.6"),
        ("hostname", "af4a84245990", "af4a84245990"),
        ("GPUs", "1", "1"),
        ("GPU", "RTX 4090", "RTX 4090"),
        ("VRAM", "24564 MiB", "24564 MiB"),
        ("driver", "550", "550.54.15"),
        ("models", "qwen2.5:7b", "qwen2.5:7b"),
    ]
    assert {(one.node, one.verdict, one.severity, one.todo) for one in found} == {("iceland", AS_EXPECTED, None, None)}


@pytest.mark.parametrize(
    ("found", "what", "expected", "said", "code"),
    [
        (state(host=HostState("box", "550.1")), "hostname", "af4a84245990", "box", "hostname-differs"),
        (state(gpus=(GPU, OTHER)), "GPUs", "1", "2", "gpu-count"),
        (state(gpus=()), "GPUs", "1", "0", "gpu-missing"),
        (state_with_smi_output(row(name="NVIDIA GeForce RTX 3090")), "GPU", "RTX 4090", "RTX 3090", "gpu-differs"),
        (state(gpus=(replace(GPU, memory_total_mib=9856),)), "VRAM", "24564 MiB", "9856 MiB", "vram-differs"),
        (state_with_smi_output(row(driver_version="560.1")), "driver", "550", "560.1", "driver-differs"),
        (state(backend=backend(models=("phi3",))), "models", "qwen2.5:7b", "none", "model-missing"),
    ],
)
def test_a_difference_has_its_finding_in_its_row(
    found: NodeState, what: str, expected: str, said: str, code: str
) -> None:
    made = compare((spec(), found))
    (wrong,) = [one for one in made if one.severity is not None]
    assert (wrong.name, wrong.expected, wrong.found, wrong.verdict) == (what, expected, said, code)
    assert wrong.todo


def test_a_driver_that_begins_as_expected_has_the_same_verdict_in_row_and_finding() -> None:
    made = {row.name: row for row in compare((spec(expect=ExpectSpec(driver="550.")), state()))}
    assert (made["driver"].verdict, made["driver"].found) == (AS_EXPECTED, "550.54.15")


def test_unknown_values_are_not_known_rather_than_wrong() -> None:
    found = {one.name: one for one in compare((spec(), without_gpus(state())))}
    assert {what: one.found for what, one in found.items() if one.verdict == "not known"} == dict.fromkeys(
        ("hostname", "GPUs", "GPU", "VRAM", "driver"), UNKNOWN
    )
    assert found["models"].verdict == AS_EXPECTED


def test_a_node_out_of_reach_has_only_its_route() -> None:
    (only,) = compare((spec(), state_with_error(errors.ConnectRefused("nothing listens on port 13323"))))
    assert (only.name, only.found, only.verdict, only.severity) == (
        "route",
        "nothing listens on port 13323",
        "node-unreachable",
        Severity.ERROR,
    )


def test_a_node_whose_server_is_down_still_has_its_gpu_rows() -> None:
    down = replace(backend(), state=BackendPhase.DOWN, last_error="nothing listens", error_code="backend-down")
    found = {one.name: one for one in compare((spec(), state(backend=down)))}
    assert (found["route"].verdict, found["GPU"].verdict) == (AS_EXPECTED, AS_EXPECTED)
    assert (found["server"].verdict, found["server"].found) == ("backend-down", "nothing listens")
    assert found["models"].verdict == "not known"


def test_the_address_of_a_wrong_server_stands_in_its_row_once() -> None:
    for code in ("wrong-server", "wrong-scheme", "redirected", "answer-broken", "models-too-many", "tls-refused"):
        message = "http://127.0.0.1:80: it is another one"
        down = BackendState("ollama", BackendPhase.DOWN, last_error=message, error_code=code)
        (found,) = (one for one in compare((spec(), state(backend=down))) if one.name == "server")
        assert (found.expected, found.found, found.verdict) == ("http://127.0.0.1:80", "it is another one", code)


def test_findings_without_an_expectation_have_rows_of_their_own() -> None:
    ill = state_with_smi_output(row(persistence_mode="Disabled", fan_speed="ERR!"), backend=backend(version="0.1.0"))
    own = [one for one in compare((spec(), ill)) if one.expected == UNKNOWN]
    assert [(one.name, one.verdict) for one in own] == [
        ("GPUs", "gpu-faulty"),
        ("server", "version-old"),
        ("GPUs", "persistence-off"),
    ]
    assert all(one.found and one.todo for one in own)


def test_findings_about_several_nodes_come_last() -> None:
    found = compare((spec(), state()), (direct(), without_gpus(state())))
    assert (found[-1].node, found[-1].name, found[-1].verdict) == ("iceland, local", "nodes", "same-gpu")
    other = replace(GPU, uuid="GPU-00000000-1")
    third = state(
        gpus=(other,), backend=backend(catalog=(replace(backend().catalog[0], digest="x", modified_at=None),))
    )
    found = compare((spec(), state()), (direct(), third))
    assert (found[-1].node, found[-1].name, found[-1].verdict) == ("iceland, local", "models", "model-differs")


def test_disabled_nodes_and_nodes_unknown_to_the_running_mesh() -> None:
    off, new = compare((replace(spec("old"), enabled=False), state()), (spec("new"), None))
    assert (off.verdict, new.verdict) == ("switched off", "not in the running mesh")
    assert off.severity is new.severity is None


def test_of_several_candidates_the_one_in_use_is_named_with_its_latency() -> None:
    made = state_with_routes(
        route("http://a:1", latency_ms=4.25), route("http://b:1", state=BackendPhase.DOWN, error="refused")
    )
    several = direct("iceland", "http://a:1", "http://b:1")
    found = {one.name: one for one in compare((several, made))}
    assert found["server"].found == "ollama 0.12.6 at http://a:1, 4.2 ms"
    assert found["routes"].verdict == "route-dead"


@pytest.mark.parametrize(
    ("ssh", "way"),
    [
        (SshSpec("box", 22, "ada"), "ssh ada@box"),
        (SshSpec("box", 2222, "ada"), "ssh ada@box:2222"),
        (SshSpec("", alias="work"), "ssh root@work"),
        (SshSpec("", address_from=AddressCommand(("pod-address", "x"))), "ssh, address from pod-address"),
    ],
)
def test_the_description_of_a_route(ssh: SshSpec, way: str) -> None:
    assert describe_route(spec(ssh=ssh)) == way


# -- the drawing -----------------------------------------------------------------------------------------------------


def draw(*pairs: tuple[NodeSpec, NodeState]) -> tuple[MachineBranch, ...]:
    return draw_topology(topology(*(one for one, _ in pairs)), [replace(each, name=one.name) for one, each in pairs])


def test_two_nodes_of_one_gpu_and_one_out_of_reach() -> None:
    gone = state_with_error(errors.ConnectRefused("nothing listens"))
    machine, away = draw(
        (spec(), state()), (direct(), without_gpus(state())), (direct("vengeance", "http://127.0.0.1:1"), gone)
    )
    assert machine.title == "RTX 4090, 24.0 GiB (GPU-8f2c1d5e…) on af4a84245990"
    assert machine.remark == "most likely one machine, by its model store"
    assert [twig.node for twig in machine.lines] == ["iceland", "local"]
    assert machine.lines[0] == RouteLine("iceland", "ssh root@203.0.113.7:13323 → http://127.0.0.1:80", "42 ms")
    assert away == MachineBranch(
        "not reached", (RouteLine("vengeance", "http://127.0.0.1:1", "nothing listens", dim=True),), reached=False
    )


def test_the_remark_tells_certain_from_likely() -> None:
    (certain,) = draw((spec(), state()), (direct(), state()))
    assert certain.remark == "one GPU: certain, by its UUID"
    (alone,) = draw((spec(), state()))
    assert alone.remark == ""


def test_every_route_of_a_node_has_a_line() -> None:
    made = state_with_routes(
        route("http://a:1", via="sshtunnel", latency_ms=41.0),
        route("http://b:1", via="sshtunnel", latency_ms=3.0),
        route("http://c:1", via="sshtunnel", state=BackendPhase.DOWN, latency_ms=None),
        route("http://203.0.113.7:80", latency_ms=20.0, offered=True),
    )
    (machine,) = draw((spec(), made))
    assert [(twig.node, twig.route, twig.remark, twig.dim) for twig in machine.lines] == [
        ("iceland", "ssh root@203.0.113.7:13323 → http://a:1", "41 ms", False),
        ("", "ssh root@203.0.113.7:13323 → http://b:1", "not in use, 3.0 ms", True),
        ("", "ssh root@203.0.113.7:13323 → http://c:1", "does not serve", True),
        ("", "http://203.0.113.7:80 without SSH", "not in use, 20 ms", True),
    ]


@pytest.mark.parametrize(
    ("gpus", "title"),
    [
        ((GPU, OTHER), "2 x RTX 4090, 24.0 GiB"),
        (
            (GPU, replace(OTHER, name="NVIDIA H100 80GB HBM3", memory_total_mib=81559)),
            "RTX 4090, 24.0 GiB + H100 80GB HBM3, 79.6 GiB",
        ),
        ((replace(GPU, memory_total_mib=None),), "RTX 4090 (GPU-8f2c1d5e…)"),
        ((), "no GPU"),
        (None, "GPU not known"),
    ],
)
def test_the_title_of_a_machine_names_its_gpus(gpus: tuple[object, ...] | None, title: str) -> None:
    (machine,) = draw((spec(expect=ExpectSpec()), state(gpus=gpus, host=HostState())))
    assert machine.title == title


def test_disabled_nodes_are_not_drawn() -> None:
    assert draw((replace(spec(), enabled=False), state())) == ()
