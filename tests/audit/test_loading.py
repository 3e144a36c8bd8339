"""When loads are a finding, and when not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.state import LoadingState, TunnelPhase
from tests.audit.build import audit_findings, loading, spec, state

TWO = (("llama3.1:8b", 3, (None,)), ("qwen2.5:7b", 3, (None,)))


def codes(loads: LoadingState | None, *, is_up: bool = True) -> list[str]:
    made = state()
    tunnel = made.tunnel if is_up else replace(made.tunnel, state=TunnelPhase.BACKOFF)
    return [finding.code for finding in audit_findings(spec(), replace(made, loading=loads, tunnel=tunnel))]


@pytest.mark.parametrize(
    "loads",
    [
        None,
        loading(19.0, *TWO),
        loading(60.0, ("llama3.1:8b", 1, (None,)), ("qwen2.5:7b", 2, (None,))),
        loading(60.0, *((f"model-{number}", 1, (None,)) for number in range(8))),
    ],
    ids=["no loads", "little time", "few loads", "each model once"],
)
def test_loads_that_are_no_fault(loads: LoadingState | None) -> None:
    assert codes(loads) == []


def test_a_node_that_spends_its_time_on_loads_is_a_finding() -> None:
    assert codes(loading(20.0, *TWO)) == ["thrashing"]
    assert codes(loading(100.0, *TWO)) == ["thrashing"]


def test_a_node_that_is_away_has_no_finding_about_its_loads() -> None:
    assert "thrashing" not in codes(loading(60.0, *TWO), is_up=False)


def test_many_models_and_contexts_are_counted() -> None:
    models = [(f"model-{number}", 2 + number, (None,)) for number in range(7)]
    (finding,) = audit_findings(spec(), replace(state(), loading=loading(60.0, *models)))
    assert "model-6, model-5, model-4, model-3 and 3 more push each other out" in finding.message
    contexts = tuple(1024 * number for number in range(1, 9))
    (finding,) = audit_findings(spec(), replace(state(), loading=loading(60.0, ("m", 9, contexts))))
    assert "(1,024, 2,048, 3,072, 4,096 and 4 more)" in finding.message
    assert "context_steps: [8192]" in (finding.hint or "")
