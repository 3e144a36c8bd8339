from __future__ import annotations

import pytest

from gpumesh.cli.views.findings import print_findings
from gpumesh.state import Finding, Severity

HOSTILE = "\x1b]0;owned\x07\x1b[31mred[bold]:smile:"


def test_findings(capsys: pytest.CaptureFixture[str]) -> None:
    print_findings([])
    assert capsys.readouterr().out == "no findings\n"
    print_findings(
        [
            Finding("same-gpu", Severity.WARNING, None, "one GPU", "count it once", nodes=("a", "b")),
            Finding("gpu-lost", Severity.ERROR, "c", HOSTILE),
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "! a, b same-gpu: one GPU",
        "  → count it once",
        "✗ c gpu-lost: red[bold]:smile:",
    ]
