from __future__ import annotations

import io
import sys

import pytest

from gpumesh.cli.views.console import PIPED_WIDTH, console
from gpumesh.cli.views.findings import print_findings
from gpumesh.state import Finding, Severity


def test_characters_that_a_stream_cannot_encode_become_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    print_findings([Finding("x", Severity.ERROR, "c", "m", "h")])
    assert buffer.getvalue() == b"x c x: m\n  > h\n"


def test_piped_output_is_wide_unless_columns_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == PIPED_WIDTH
    monkeypatch.setenv("COLUMNS", "72")
    assert console().width == 72
