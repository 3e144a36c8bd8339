"""A silence that is noticed soon, so that no test waits for long."""

from __future__ import annotations

import pytest

from gpumesh.mesh.requests import silence_watch
from tests.mesh.requests.streams import PATIENCE_S


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence_watch, "MIN_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(silence_watch, "PAUSE_FACTOR", 1.0)
