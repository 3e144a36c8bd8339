"""Nodes that go away while a benchmark measures a real mesh over stand-ins in this process."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.workload.settings import BenchSettings, Scenario
from gpumesh.mesh.outages.outage import OutageKind
from gpumesh.state import Health, MeshState
from tests.bench.test_run import Heard, Target, named, ran, two
from tests.mesh.meshes import MODEL


async def test_failover_drains_a_node_and_gives_it_back() -> None:
    async with two() as made:
        target = Target(made.mesh)
        done = await ran(made, Scenario.FAILOVER, BenchSettings(MODEL, requests=30, tokens=8), target=target)
        assert [one.health for one in made.mesh.snapshot().nodes] == [Health.HEALTHY, Health.HEALTHY]
    assert len(target.held) == 1
    assert target.released == target.held
    (stage,) = done.result.stages
    assert stage.disturbance == f"{target.held[0]}: drained"
    assert (stage.served, stage.failed) == (30, 0), "nothing is lost"
    assert [phase.name for phase in stage.phases] == ["before", "during", "after"]
    assert sum(phase.requests for phase in stage.phases) == 30
    failover = done.result.failover
    assert failover is not None
    assert (failover.node, failover.by, failover.continued) == (target.held[0], OutageKind.DRAIN, 0)
    assert failover.noticed_ms is not None
    assert failover.healthy_ms is not None
    assert failover.serves_ms is not None
    assert any("a node was drained" in note for note in done.result.notes)


@dataclass
class OneNodeGone(Heard, Target):
    """A mesh that tells that ``beta`` is down, from the first answer of the stage ``mesh`` on."""

    is_gone: bool = False

    def add_record(self, record: LoadSample) -> None:
        self.is_gone = self.stages[-1] == "mesh"

    async def status(self) -> MeshState:
        state = self.mesh.snapshot()
        if not self.is_gone:
            return state
        nodes = [
            replace(one, health=Health.DOWN, reason="it is gone") if one.name == "beta" else one for one in state.nodes
        ]
        return replace(state, nodes=tuple(nodes))


async def test_a_node_that_dies_in_a_stage_is_in_the_result() -> None:
    async with two() as made:
        target = OneNodeGone(made.mesh)
        done = await ran(made, Scenario.QUICK, target=target, heard=target)
    (event,) = named(done, "mesh").node_events
    assert (event.node, event.health, event.to_s, event.reason) == ("beta", Health.DOWN, None, "it is gone")
    assert [note for note in done.result.notes if note.startswith("stage mesh: beta was down from ")]
    assert named(done, "beta").node_events == ()
