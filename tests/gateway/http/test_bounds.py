from __future__ import annotations

import resource

import pytest

from gpumesh.gateway.http import bounds


def test_as_many_connections_as_the_process_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, allowed in ((1024, 384), (65536, 32640), (resource.RLIM_INFINITY, 1 << 20), (100, 64)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert bounds.compute_max_connections() == allowed
