"""Each staged fault gives its own finding, with a hint that can be acted on, and no fault gives two."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh import errors
from gpumesh.audit import CATALOG
from gpumesh.state import (
    HostState,
)
from tests.audit.build import (
    GPU,
    MODEL,
    audit_findings,
    backend,
    spec,
    state,
    state_with_error,
    state_with_smi_output,
)
from tests.audit.host_faults import HOST_FAULTS
from tests.audit.server_faults import SERVER_FAULTS
from tests.audit.staged_faults import ERROR, INFO, WARNING
from tests.probes.shell_host import row

FAULTS = HOST_FAULTS | SERVER_FAULTS


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_one_finding(name: str) -> None:
    fault = FAULTS[name]
    (finding,) = audit_findings(fault.specs, *fault.states)
    assert (finding.code, finding.severity) == (fault.code, fault.severity)
    assert finding.code in CATALOG
    assert fault.message in finding.message
    assert finding.hint, "every finding says what to do"
    assert fault.hint in finding.hint
    names = {spec.name for spec in fault.specs}
    assert finding.node in names or (len(names) > 1 and set(finding.nodes) == names)
    assert set(finding.nodes) in (set(), names)


def test_faults_of_all_kinds_are_staged() -> None:
    assert len(FAULTS) >= 25
    assert len({fault.code for fault in FAULTS.values()}) >= 35


def test_a_node_as_expected_has_no_finding() -> None:
    assert audit_findings(spec(), state()) == ()
    assert audit_findings(spec(), state_with_smi_output()) == ()


def test_several_faults_give_several_findings_the_worst_first() -> None:
    ill = state_with_smi_output(
        row(name="NVIDIA GeForce RTX 3090", persistence_mode="Disabled", fan_speed="ERR!"),
        host=HostState("box", "550.54.15"),
        backend=backend(version="0.1.0", models=()),
    )
    assert [(finding.severity, finding.code) for finding in audit_findings(spec(), ill)] == [
        (ERROR, "gpu-faulty"),
        (WARNING, "hostname-differs"),
        (WARNING, "gpu-differs"),
        (WARNING, "version-old"),
        (WARNING, "model-missing"),
        (INFO, "persistence-off"),
    ]


def test_disabled_and_unknown_nodes_have_no_finding() -> None:
    off = replace(spec(), enabled=False)
    assert audit_findings(off, state_with_error(errors.ConnectRefused("refused"))) == ()
    assert audit_findings((spec(), spec("new")), state()) == ()
    assert audit_findings(spec(), state(), state("a node of an older file")) == ()


def test_a_model_that_is_missing_everywhere_is_a_finding_of_each_node() -> None:
    lacks = backend(models=("x",), catalog=(replace(MODEL, name="x", modified_at=None),))
    ill = [replace(state(name), backend=lacks, gpus=(replace(GPU, uuid=f"GPU-0000000{name}"),)) for name in ("a", "b")]
    specs = [replace(spec(name), ssh=replace(spec().ssh, host=name)) for name in ("a", "b")]  # type: ignore[type-var]
    assert [(finding.code, finding.node) for finding in audit_findings(specs, *ill)] == [
        ("model-missing", "a"),
        ("model-missing", "b"),
    ]
