"""An outage that cannot be ended is told, with what to do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gpumesh.bench.failover.outage_disturbance import OutageDisturbance
from gpumesh.bench.failover.outage_plan import OutagePlan
from gpumesh.errors import ExecError, GPUMeshError
from gpumesh.mesh.outages.outage import Outage, OutageKind
from gpumesh.state import MeshState
from tests.bench.failover.test_outage_plan import MIXED, NAMES


class StubbornTarget:
    """A mesh whose start command fails."""

    embedded = False

    async def status(self) -> MeshState:
        return MIXED

    @asynccontextmanager
    async def hold(self, node: str, outage: Outage) -> AsyncIterator[None]:
        yield
        raise ExecError(f"the command {outage.start_command!r} ended with exit status 1 on {node}")


async def test_a_server_that_does_not_start_again_is_told_with_the_command() -> None:
    plan = OutagePlan(OutageKind.SERVER, "near", "stop it", "start 'it'")
    disturbance = OutageDisturbance(StubbornTarget(), plan, NAMES, MIXED)
    assert await disturbance.begin() == "near: server stopped"
    with pytest.raises(GPUMeshError, match="the server of near may still be stopped: the command") as caught:
        await disturbance.end()
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("start it: `gpumesh exec near -- sh -c 'start ")


async def test_an_outage_that_never_began_has_no_end() -> None:
    disturbance = OutageDisturbance(StubbornTarget(), OutagePlan(OutageKind.DRAIN), NAMES, MIXED)
    await disturbance.end()
    assert disturbance.times is None
