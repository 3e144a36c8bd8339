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


def compared(*pairs: tuple[NodeSpec, NodeState | None]) -> list[ComparisonRow]:
    made = topology(*(one for one, _ in pairs))
    states = [replace(each, name=one.name) for one, each in pairs if each is not None]
    return list(compare_nodes(made, states, audit.collect_findings(made, states)))


def test_what_is_as_expected_is_said_to_be() -> None:
    found = compared((spec(), state()))
    assert [(one.what, one.expected, one.found) for one in found] == [
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
def test_what_differs_has_its_finding_in_its_row(
    found: NodeState, what: str, expected: str, said: str, code: str
) -> None:
    made = compared((spec(), found))
    (wrong,) = [one for one in made if one.severity is not None]
    assert (wrong.what, wrong.expected, wrong.found, wrong.verdict) == (what, expected, said, code)
    assert wrong.todo


def test_what_is_not_known_is_not_said_to_be_wrong() -> None:
    found = {one.what: one for one in compared((spec(), without_gpus(state())))}
    assert {what: one.found for what, one in found.items() if one.verdict == "not known"} == dict.fromkeys(
        ("hostname", "GPUs", "GPU", "VRAM", "driver"), UNKNOWN
    )
    assert found["models"].verdict == AS_EXPECTED


def test_a_node_that_is_not_reached_says_only_that() -> None:
    (only,) = compared((spec(), state_with_error(errors.ConnectRefused("nothing listens on port 13323"))))
    assert (only.what, only.found, only.verdict, only.severity) == (
        "route",
        "nothing listens on port 13323",
        "node-unreachable",
        Severity.ERROR,
    )


def test_a_server_that_is_down_keeps_the_gpu_in_sight() -> None:
    down = replace(backend(), state=BackendPhase.DOWN, last_error="nothing listens", error_code="backend-down")
    found = {one.what: one for one in compared((spec(), state(backend=down)))}
    assert (found["route"].verdict, found["GPU"].verdict) == (AS_EXPECTED, AS_EXPECTED)
    assert (found["server"].verdict, found["server"].found) == ("backend-down", "nothing listens")
    assert found["models"].verdict == "not known"


def test_a_server_that_answers_wrongly_has_its_address_beside_it_once() -> None:
    for code in ("wrong-server", "wrong-scheme", "redirected", "answer-broken", "models-too-many", "tls-refused"):
        message = "http://127.0.0.1:80: it is another one"
        down = BackendState("ollama", BackendPhase.DOWN, last_error=message, error_code=code)
        (found,) = (one for one in compared((spec(), state(backend=down))) if one.what == "server")
        assert (found.expected, found.found, found.verdict) == ("http://127.0.0.1:80", "it is another one", code)


def test_findings_without_an_expectation_have_rows_of_their_own() -> None:
    ill = state_with_smi_output(row(persistence_mode="Disabled", fan_speed="ERR!"), backend=backend(version="0.1.0"))
    own = [one for one in compared((spec(), ill)) if one.expected == UNKNOWN]
    assert [(one.what, one.verdict) for one in own] == [
        ("GPUs", "gpu-faulty"),
        ("server", "version-old"),
        ("GPUs", "persistence-off"),
    ]
    assert all(one.found and one.todo for one in own)


def test_what_concerns_several_nodes_comes_last() -> None:
    found = compared((spec(), state()), (direct(), without_gpus(state())))
    assert (found[-1].node, found[-1].what, found[-1].verdict) == ("iceland, local", "nodes", "same-gpu")
    other = replace(GPU, uuid="GPU-00000000-1")
    third = state(
        gpus=(other,), backend=backend(catalog=(replace(backend().catalog[0], digest="x", modified_at=None),))
    )
    found = compared((spec(), state()), (direct(), third))
    assert (found[-1].node, found[-1].what, found[-1].verdict) == ("iceland, local", "models", "model-differs")


def test_nodes_that_are_off_or_unknown_to_the_running_mesh() -> None:
    off, new = compared((replace(spec("old"), enabled=False), state()), (spec("new"), None))
    assert (off.verdict, new.verdict) == ("switched off", "not in the running mesh")
    assert off.severity is new.severity is None


def test_candidates_say_which_one_is_in_use_and_how_fast() -> None:
    made = state_with_routes(
        route("http://a:1", latency_ms=4.25), route("http://b:1", state=BackendPhase.DOWN, error="refused")
    )
    several = direct("iceland", "http://a:1", "http://b:1")
    found = {one.what: one for one in compared((several, made))}
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
def test_how_a_node_is_reached(ssh: SshSpec, way: str) -> None:
    assert describe_route(spec(ssh=ssh)) == way


# -- the drawing -----------------------------------------------------------------------------------------------------


def drawn(*pairs: tuple[NodeSpec, NodeState]) -> tuple[MachineBranch, ...]:
    return draw_topology(topology(*(one for one, _ in pairs)), [replace(each, name=one.name) for one, each in pairs])


def test_two_ways_to_one_gpu_and_one_to_nowhere() -> None:
    gone = state_with_error(errors.ConnectRefused("nothing listens"))
    machine, away = drawn(
        (spec(), state()), (direct(), without_gpus(state())), (direct("vengeance", "http://127.0.0.1:1"), gone)
    )
    assert machine.title == "RTX 4090, 24.0 GiB (GPU-8f2c1d5e…) on af4a84245990"
    assert machine.remark == "most likely one machine, by its model store"
    assert [twig.node for twig in machine.lines] == ["iceland", "local"]
    assert machine.lines[0] == RouteLine("iceland", "ssh root@203.0.113.7:13323 → http://127.0.0.1:80", "42 ms")
    assert away == MachineBranch(
        "not reached", (RouteLine("vengeance", "http://127.0.0.1:1", "nothing listens", dim=True),), reached=False
    )


def test_certain_or_likely() -> None:
    (certain,) = drawn((spec(), state()), (direct(), state()))
    assert certain.remark == "one GPU: certain, by its UUID"
    (alone,) = drawn((spec(), state()))
    assert alone.remark == ""


def test_every_way_of_a_node() -> None:
    made = state_with_routes(
        route("http://a:1", via="sshtunnel", latency_ms=41.0),
        route("http://b:1", via="sshtunnel", latency_ms=3.0),
        route("http://c:1", via="sshtunnel", state=BackendPhase.DOWN, latency_ms=None),
        route("http://203.0.113.7:80", latency_ms=20.0, offered=True),
    )
    (machine,) = drawn((spec(), made))
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
def test_what_a_machine_has(gpus: tuple[object, ...] | None, title: str) -> None:
    (machine,) = drawn((spec(expect=ExpectSpec()), state(gpus=gpus, host=HostState())))
    assert machine.title == title


def test_nodes_that_are_off_are_not_drawn() -> None:
    assert drawn((replace(spec(), enabled=False), state())) == ()
