"""What is written into mesh.yaml, and what is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpumesh import audit, errors
from gpumesh.audit.changes import Change, apply_changes, plan_changes, unsettled_findings
from gpumesh.state import BackendPhase, BackendState, Finding, HostState, NodeState, Severity
from gpumesh.topology import BackendKind, ExpectSpec, NodeSpec
from tests.audit.build import (
    GPU,
    OTHER,
    backend,
    direct,
    route,
    spec,
    state,
    state_with_error,
    state_with_smi_output,
    topology,
    without_gpus,
)
from tests.probes.shell_host import OTHER_UUID, row


def plan(*pairs: tuple[NodeSpec, NodeState]) -> tuple[Change, ...]:
    made = topology(*(one for one, _ in pairs))
    states = [replace(each, name=one.name) for one, each in pairs]
    return plan_changes(made, states, audit.collect_findings(made, states))


def values(*pairs: tuple[NodeSpec, NodeState]) -> dict[str, Any]:
    return {f"{change.node}.{'.'.join(change.path)}": change.value for change in plan(*pairs)}


WELL = (
    direct("well", "http://198.51.100.7:11434"),
    state(gpus=(replace(GPU, uuid="GPU-00000000-1"),), backend=backend(catalog=())),
)
REFUSED = state_with_error(errors.ConnectRefused("nothing listens on x"))


def test_a_file_that_is_right_is_not_changed() -> None:
    assert plan((spec(), state())) == ()


@pytest.mark.parametrize(
    ("found", "corrected"),
    [
        (state(host=HostState("box", "550.1")), {"hostname": "box"}),
        (state(gpus=(GPU, OTHER)), {"gpus": 2}),
        (state_with_smi_output(row(driver_version="560.35")), {"driver": "560.35"}),
        (state(gpus=(replace(GPU, memory_total_mib=9856),)), {"vram_mib": 9856}),
        (
            state_with_smi_output(row(name="NVIDIA H100 80GB HBM3", memory_total="81559", driver_version="590.48")),
            {"gpu": "NVIDIA H100 80GB HBM3", "vram_mib": 81559, "driver": "590.48"},
        ),
        (
            state_with_smi_output(
                row(name="X 1", memory_total="1") + "\n" + row(index="1", uuid=OTHER_UUID, name="Y", memory_total="2")
            ),
            {"gpus": 2},
        ),
    ],
    ids=["hostname", "count", "driver", "slice", "another card", "cards of two kinds"],
)
def test_wrong_expectations_of_the_hardware_are_corrected(found: NodeState, corrected: dict[str, Any]) -> None:
    assert values((spec(), found)) == {f"iceland.expect.{key}": value for key, value in corrected.items()}


def test_the_corrected_file_has_no_findings() -> None:
    found = state_with_smi_output(
        row(name="NVIDIA H100 80GB HBM3", memory_total="81559"), host=HostState("box", "590.48")
    )
    made = topology(spec())
    first = audit.collect_findings(made, [found])
    assert len(first) == 3
    done = plan_changes(made, [found], first)
    assert unsettled_findings(first, done) == ()
    assert audit.collect_findings(apply_changes(made, done), [found]) == ()


@pytest.mark.parametrize(
    "found",
    [
        state_with_smi_output("No devices were found", 6),
        state_with_smi_output("Unable to determine the device handle", 15),
        state_with_smi_output("NVIDIA-SMI has failed", 9),
        state_with_smi_output("not found", 127),
        state_with_smi_output(row(fan_speed="ERR!")),
        state(gpus=()),
        state(backend=backend(models=())),
        state(backend=backend(version="0.1.0")),
        state(host=HostState("af4a84245990", "550.1", store_free_mib=1)),
        state(backend=BackendState("ollama", BackendPhase.DOWN, last_error="refused")),
    ],
)
def test_the_fault_of_a_host_changes_nothing(found: NodeState) -> None:
    made = topology(spec())
    findings = audit.collect_findings(made, [found])
    assert findings
    assert plan_changes(made, [found], findings) == ()
    assert unsettled_findings(findings, ()) == findings


def test_a_lost_gpu_is_still_expected() -> None:
    found = state_with_smi_output(row() + "\nGPU is lost", 15, gpus=(GPU,))
    assert plan((spec(expect=ExpectSpec(gpus=2)), found)) == ()


# -- nodes that lead nowhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        errors.ConnectRefused("refused"),
        errors.ConnectTimeout("silent"),
        errors.HostUnresolved("unknown"),
        errors.HostUnreachable("no route"),
        errors.NotSsh("HTTP"),
    ],
)
def test_a_node_without_a_host_is_switched_off(error: errors.TunnelError) -> None:
    (change,) = plan(WELL, (spec(), state_with_error(error)))
    assert (change.node, change.path, change.value) == ("iceland", ("enabled",), False)
    assert change.why == f"not found: {error.message}"


@pytest.mark.parametrize(
    "error",
    [
        errors.TunnelLost("reset"),
        errors.AuthRefused("no"),
        errors.HostKeyChanged("other"),
        errors.HostKeyUnknown("new"),
        errors.SecretMissing("unset"),
        errors.ForwardingForbidden("no"),
    ],
)
def test_a_node_with_a_host_is_not_switched_off(error: errors.TunnelError) -> None:
    assert plan(WELL, (spec(), state_with_error(error))) == ()


def test_no_node_is_switched_off_when_no_host_answers() -> None:
    """Then it is this machine's network."""
    assert plan((spec("a"), REFUSED), (direct("b"), REFUSED)) == ()


def test_no_node_is_switched_off_when_only_a_server_on_this_machine_answers() -> None:
    assert plan((direct("a", "http://127.0.0.1:11434"), state()), (spec("b"), REFUSED)) == ()


def test_an_absent_node_is_switched_off_when_another_host_answers_without_a_server() -> None:
    down = BackendState("ollama", BackendPhase.DOWN, last_error="refused")
    (change,) = plan((direct("a", "http://198.51.100.1:1"), state(backend=down)), (spec("b"), REFUSED))
    assert (change.node, change.path, change.value) == ("b", ("enabled",), False)


def test_a_duplicate_is_switched_off_even_when_no_host_answers() -> None:
    (change,) = plan((spec("a"), REFUSED), (spec("b"), REFUSED))
    assert (change.node, change.value, change.why) == ("b", False, "the same server as a")


def test_a_direct_node_without_its_server() -> None:
    (change,) = plan(WELL, (direct("vengeance", "http://127.0.0.1:1"), REFUSED))
    assert (change.node, change.value, change.settled_codes) == ("vengeance", False, frozenset({"backend-down"}))


# -- nodes that are another one once more ----------------------------------------------------------------------------


def test_of_two_nodes_with_one_gpu_one_is_switched_off() -> None:
    (change,) = plan((spec(), state()), (direct(), without_gpus(state())))
    assert (change.node, change.path, change.value, change.why) == (
        "local",
        ("enabled",),
        False,
        "the same GPU as iceland",
    )


def test_of_two_nodes_with_one_server_one_is_switched_off() -> None:
    specs = (spec(), state()), (spec("copy"), state()), (spec("again"), state())
    assert values(*specs) == {"copy.enabled": False, "again.enabled": False}


def test_a_node_that_is_switched_off_is_not_corrected() -> None:
    wrong = replace(state(), host=HostState("box", "560.1"))
    first, second = plan((spec("first", expect=ExpectSpec()), state()), (spec("second"), wrong)), ()
    assert [(change.node, change.path) for change in (*first, *second)] == [("second", ("enabled",))]


def test_the_changes_settle_their_findings() -> None:
    made = topology(spec(), direct(), direct("gone", "http://127.0.0.1:1"))
    states = [
        state(host=HostState("box", "550.1")),
        replace(without_gpus(state()), name="local"),
        replace(REFUSED, name="gone"),
    ]
    findings = audit.collect_findings(made, states)
    assert {finding.code for finding in findings} == {"hostname-differs", "same-gpu", "backend-down"}
    done = plan_changes(made, states, findings)
    assert unsettled_findings(findings, done) == ()
    assert audit.collect_findings(apply_changes(made, done), states) == ()


# -- another kind of server ------------------------------------------------------------------------------------------

WRONG = Finding("wrong-server", Severity.ERROR, "iceland", "an OpenAI-compatible server", "set `backend.kind: openai`")


def wrong_server(*kinds: str | None) -> NodeState:
    ways = tuple(
        route(f"http://x:{number}", state=BackendPhase.DOWN, kind=kind, error_code="wrong-server")
        for number, kind in enumerate(kinds)
    )
    down = BackendState("ollama", BackendPhase.DOWN, last_error=WRONG.message, error_code=WRONG.code)
    return state(backend=down, noticed=(WRONG,), routes=ways)


def test_the_kind_of_a_server_is_corrected() -> None:
    assert values((spec(), wrong_server("openai"))) == {"iceland.backend.kind": "openai"}
    assert values((spec(), wrong_server(None, "openai"))) == {"iceland.backend.kind": "openai"}
    assert values((spec(), wrong_server(None))) == {}


def test_changes_are_applied_to_the_specs() -> None:
    made = topology(spec(), direct())
    done = apply_changes(
        made,
        [
            Change("iceland", ("backend", "kind"), "openai", frozenset()),
            Change("iceland", ("expect", "gpus"), 3, frozenset()),
            Change("local", ("enabled",), False, frozenset()),
        ],
    )
    assert (done.nodes[0].backend.kind, done.nodes[0].expect.gpus) == (BackendKind.OPENAI, 3)
    assert [node.enabled for node in done.nodes] == [True, False]
    with pytest.raises(ValueError, match="no such change"):
        apply_changes(made, [Change("local", ("name",), "x", frozenset())])
