"""What a ramp finds out about nodes whose truth is known, and what the scenarios make of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpumesh.bench.figures.knee import find_knee
from gpumesh.bench.figures.scaling import scaling
from gpumesh.bench.scenarios.sweep import sweep_levels
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.settings import BenchSettings, Scenario
from gpumesh.bench.workload.stages import StageKind
from tests.bench.scenarios.played_mesh import PlayedMesh, PlayedNode, play


def ramp_levels(mesh: PlayedMesh, node: str) -> list[int | None]:
    return [stage.concurrency for stage in mesh.stages if stage.kind is StageKind.CAPACITY and stage.node == node]


@pytest.mark.parametrize(
    ("slots", "levels"), [(1, [1, 2, 2]), (2, [1, 2, 4, 4]), (4, [1, 2, 4, 8, 8]), (6, [1, 2, 4, 8, 8])]
)
def test_a_ramp_ends_where_the_slots_end(slots: int, levels: list[int]) -> None:
    mesh = PlayedMesh({"alpha": PlayedNode(slots)})
    (capacity,) = play(mesh, Scenario.SCALE).capacities
    assert capacity.parallel == slots
    assert capacity.tokens_per_s == pytest.approx(slots * 50 / 1.05, rel=0.03)
    assert capacity.reason == "these are all slots of its server"
    assert ramp_levels(mesh, "alpha")[: len(levels) - 1] == levels[: len(levels) - 1]
    assert len(ramp_levels(mesh, "alpha")) <= len(levels)


def test_a_gpu_that_is_full_before_its_slots_are() -> None:
    """64 slots, but no more than 400 tokens/s: 8 streams of 50 are all that it can do."""
    mesh = PlayedMesh({"alpha": PlayedNode(64, most=400.0)})
    (capacity,) = play(mesh, Scenario.SCALE).capacities
    assert (capacity.parallel, ramp_levels(mesh, "alpha")) == (8, [1, 2, 4, 8, 16, 16])
    assert capacity.reason == "16 at once give no more"


def test_a_server_that_does_not_count_its_tokens() -> None:
    """Its answers are counted instead, which are equally long."""
    (capacity,) = play(PlayedMesh({"alpha": PlayedNode(64, most=400.0, counts=False)}), Scenario.SCALE).capacities
    assert (capacity.parallel, capacity.tokens_per_s) == (8, None)
    assert capacity.reason == "16 at once give no more"


def test_what_the_mesh_keeps_in_its_queue_is_asked_of_the_server_itself() -> None:
    mesh = PlayedMesh({"alpha": PlayedNode(8, limit=2)})
    context = play(mesh, Scenario.SCALE, known=True)
    (capacity,) = context.capacities
    direct = [stage for stage in mesh.stages if stage.direct]
    assert [(stage.concurrency, stage.node) for stage in direct] == [(4, "alpha")]
    assert (capacity.parallel, capacity.server_parallel) == (2, 4)
    assert any("the mesh gives it 2 at a time; its server runs 4 or more at once" in note for note in context.notes)
    true_limit = PlayedMesh({"alpha": PlayedNode(2, limit=2)})
    context = play(true_limit, Scenario.SCALE, known=True)
    assert (context.capacities[0].parallel, context.capacities[0].server_parallel) == (2, None)
    assert context.capacities[0].reason == "these are all slots of its server"
    assert context.notes == []


def test_a_number_that_is_known_and_not_true() -> None:
    """mesh.yaml says 8, the server runs 3."""
    mesh = PlayedMesh({"alpha": PlayedNode(3, limit=8)})
    context = play(mesh, Scenario.SCALE, known=True)
    (capacity,) = context.capacities
    assert (capacity.parallel, ramp_levels(mesh, "alpha")) == (3, [8])
    (note,) = context.notes
    assert note.startswith("alpha: its server runs 3 at once, but the mesh sends it up to 8: max_parallel in mesh.yaml")


def test_a_level_that_did_not_fill_while_the_mesh_learned_is_sent_again() -> None:
    """The mesh lets two requests go at first, and then all four slots are used."""

    def learn(nodes: dict[str, PlayedNode]) -> None:
        nodes["alpha"].limit = 4

    mesh = PlayedMesh({"alpha": PlayedNode(4, limit=2)}, changes={"capacity of alpha: 4 in flight": [learn]})
    (capacity,) = play(mesh, Scenario.SCALE).capacities
    assert (capacity.parallel, ramp_levels(mesh, "alpha")) == (4, [1, 2, 4, 4, 8, 8])


def test_a_slow_node_is_not_ramped_for_ever() -> None:
    mesh = PlayedMesh({"alpha": PlayedNode(512, rate=0.5)})
    context = play(mesh, Scenario.SCALE)
    assert len(ramp_levels(mesh, "alpha")) <= 2
    assert any("its ramp ended there" in note for note in context.notes)


def test_a_node_that_serves_nothing_ends_its_ramp() -> None:
    mesh = PlayedMesh({"alpha": PlayedNode(4, is_broken=True), "beta": PlayedNode(1)})
    context = play(mesh, Scenario.SCALE)
    assert [(one.parallel, one.tokens_per_s) for one in context.capacities] == [
        (1, None),
        (1, pytest.approx(47.6, rel=0.03)),
    ]


def test_scale_is_100_percent_where_the_truth_is() -> None:
    mesh = PlayedMesh({"alpha": PlayedNode(4), "beta": PlayedNode(2, rate=25.0)})
    play(mesh, Scenario.SCALE)
    figures = [result for result in mesh.results if result.kind in (StageKind.NODE, StageKind.MESH)]
    assert [(one.name, one.concurrency) for one in figures] == [("alpha", 4), ("beta", 2), ("mesh", 6)]
    assert all(one.requests % (one.concurrency or 1) == 0 for one in figures)
    made = scaling(figures)
    assert made is not None
    assert made.efficiency == pytest.approx(1.0, abs=0.03)
    assert made.explanation is None
    mesh_stage, beta = figures[2], figures[1]
    assert mesh_stage.duration_s >= beta.duration_s, "the slow node answers as often as alone"


def test_a_limit_that_shrinks_after_the_ramp_is_told() -> None:
    def shrink(nodes: dict[str, PlayedNode]) -> None:
        nodes["alpha"].limit = 1

    mesh = PlayedMesh({"alpha": PlayedNode(2, limit=2)}, changes={"alpha": [shrink]})
    notes = play(mesh, Scenario.SCALE, known=True).notes
    assert notes == [
        "while stage alpha ran, the limit of alpha changed from 2 to 1: it was measured again",
        "the mesh gives alpha 1 at a time, not 2: its rates are below its capacity",
    ]


def test_a_node_that_was_measured_alone_under_another_limit_is_measured_again() -> None:
    """The limit shrinks by mistake and grows again in the mesh's stage: without another look that is 133 %."""

    def set_limit(limit: int) -> Callable[[dict[str, PlayedNode]], None]:
        return lambda nodes: setattr(nodes["alpha"], "limit", limit)

    changes = {"alpha": [set_limit(2)], "mesh": [set_limit(4)]}
    mesh = PlayedMesh({"alpha": PlayedNode(4, limit=4), "beta": PlayedNode(2)}, changes=changes)
    notes = play(mesh, Scenario.SCALE).notes
    assert notes == [
        "while stage alpha ran, the limit of alpha changed from 4 to 2: it was measured again",
        "while stage mesh ran, the limit of alpha changed from 2 to 4: it was measured again",
        "alpha was measured alone when its limit was 2, and it is 4 in the mesh: it was measured alone again",
    ]
    last = {result.name: result for result in mesh.results if result.kind in (StageKind.NODE, StageKind.MESH)}
    made = scaling(list(last.values()))
    assert made is not None
    assert made.efficiency == pytest.approx(1.0, abs=0.03)


def test_an_efficiency_far_from_100_percent_must_show_twice() -> None:
    """A node is slow while it is measured alone, and never again: that would be 150 %."""

    def set_rate(tokens_per_s: float) -> Callable[[dict[str, PlayedNode]], None]:
        return lambda nodes: setattr(nodes["alpha"], "rate", tokens_per_s)

    changes = {"warm-up at 2": [set_rate(50.0), set_rate(20.0)], "alpha": [set_rate(50.0)]}
    mesh = PlayedMesh({"alpha": PlayedNode(2), "beta": PlayedNode(2)}, changes=changes)
    notes = play(mesh, Scenario.SCALE, BenchSettings("m", concurrency=(2,))).notes
    assert notes == ["the efficiency was 142%: nodes and mesh were measured again"]
    assert [stage.name for stage in mesh.stages if stage.attempt > 1] == ["alpha", "beta", "mesh"]
    last = {result.name: result for result in mesh.results if result.kind in (StageKind.NODE, StageKind.MESH)}
    made = scaling(list(last.values()))
    assert made is not None
    assert made.efficiency == pytest.approx(1.0, abs=0.03)


def test_a_stage_in_which_a_limit_changed_is_measured_again() -> None:
    def learn(nodes: dict[str, PlayedNode]) -> None:
        nodes["alpha"].at_once += 1

    once = PlayedMesh({"alpha": PlayedNode(1)}, changes={"alpha": [learn]})
    context = play(once, Scenario.SCALE)
    assert [stage.attempt for stage in once.stages if stage.name == "alpha"] == [1, 2]
    assert context.notes == ["while stage alpha ran, the limit of alpha changed from 1 to 2: it was measured again"]
    prompts = [request.chat.messages[0].content for stage in once.stages for request in stage.requests]
    assert len(set(prompts)) == len(prompts), "no server has a prompt of the first try in its cache"
    always = PlayedMesh({"alpha": PlayedNode(1)}, changes={"alpha": [learn] * 9})
    context = play(always, Scenario.SCALE)
    assert [stage.attempt for stage in always.stages if stage.name == "alpha"] == [1, 2, 3]
    assert context.notes[-1].endswith("changed from 3 to 4: its figures are not those of a settled mesh")


def test_a_stage_in_which_a_model_was_swapped_is_measured_again() -> None:
    def swap(nodes: dict[str, PlayedNode]) -> None:
        nodes["alpha"].loaded = ("other:7b",)

    mesh = PlayedMesh({"alpha": PlayedNode(1), "beta": PlayedNode(1)}, changes={"beta": [swap], "mesh": [swap]})
    context = play(mesh, Scenario.QUICK)
    assert context.notes == [], "what happens on alpha is nothing to the stage of beta, and the second swap is none"
    mesh = PlayedMesh({"alpha": PlayedNode(1), "beta": PlayedNode(1)}, changes={"mesh": [swap]})
    assert play(mesh, Scenario.QUICK).notes == [
        "while stage mesh ran, alpha loaded other:7b; alpha unloaded m:latest: it was measured again"
    ]


def test_the_levels_of_a_sweep_go_past_the_capacity() -> None:
    assert sweep_levels(1) == (1, 2)
    assert sweep_levels(6) == (1, 2, 4, 6, 9, 12)
    assert sweep_levels(8) == (1, 2, 4, 8, 12, 16)


def test_sweep_rises_to_the_knee_and_is_flat_past_it() -> None:
    mesh = PlayedMesh({"alpha": PlayedNode(4), "beta": PlayedNode(2)})
    play(mesh, Scenario.SWEEP)
    figures = [result for result in mesh.results if result.kind is StageKind.MESH]
    assert [one.concurrency for one in figures] == [1, 2, 4, 6, 9, 12]
    rates = [one.rates.best_tokens_per_s or 0.0 for one in figures]
    assert rates == pytest.approx([min(level, 6) * 50 / 1.04 for level in (1, 2, 4, 6, 9, 12)], rel=0.02)
    knee = find_knee(figures, Objective())
    assert knee is not None
    assert (knee.level, knee.is_passed) == (6, True)
    assert knee.text == "6 in flight: 289 tok/s, TTFT 50 ms; past it only waiting grows"
    assert knee.goodput_text.startswith("goodput 4.51 req/s (TTFT")


def test_a_dip_must_show_twice() -> None:
    def set_rate(tokens_per_s: float) -> Callable[[dict[str, PlayedNode]], None]:
        return lambda nodes: setattr(nodes["alpha"], "rate", tokens_per_s)

    changes = {"c=2": [set_rate(10.0)], "c=4": [set_rate(50.0)]}  # after c=2, and after the first try of c=4
    mesh = PlayedMesh({"alpha": PlayedNode(4)}, changes=changes)
    notes = play(mesh, Scenario.SWEEP, BenchSettings("m", concurrency=(1, 2, 4))).notes
    assert [stage.attempt for stage in mesh.stages if stage.name == "c=4"] == [1, 4]
    assert notes == ["stage c=4 gave less than a lower level: it was measured again"]
    assert mesh.results[-1].rates.best_tokens_per_s == pytest.approx(192.0, rel=0.02), "the second time counts"


def test_chosen_levels_are_warmed_up_and_not_ramped() -> None:
    mesh = PlayedMesh({"alpha": PlayedNode(4)})
    context = play(mesh, Scenario.SWEEP, BenchSettings("m", concurrency=(1, 3)))
    assert [(stage.kind, stage.concurrency) for stage in mesh.stages] == [
        (StageKind.WARM_UP, 1),
        (StageKind.WARM_UP, 3),
        (StageKind.MESH, 1),
        (StageKind.MESH, 3),
    ]
    assert context.capacities == []
