from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends import safe_json
from gpumesh.mesh.models.merged_progress import MAX_STEPS_PER_NODE, MergedProgress
from gpumesh.mesh.models.store_answers import StoreRefusal, StoreStep, parse_step


def layer(completed: int, *, total: int = 100, digest: str = "sha256:1") -> StoreStep:
    return StoreStep("pulling 1", digest, completed, total)


def status(text: str) -> StoreStep:
    return StoreStep(text)


def test_the_progress_of_one_node_is_passed_on_as_it_is() -> None:
    progress = MergedProgress(["a"])
    steps: list[StoreStep] = []
    for step in (status("pulling manifest"), layer(0), layer(50), layer(100), status("writing"), status("success")):
        progress.add_step("a", step)
        steps += progress.take_steps()
    assert steps == [status("pulling manifest"), layer(0), layer(50), layer(100), status("writing")]
    assert progress.done == ("a",)


def test_a_layer_is_as_far_as_the_nodes_are_on_average() -> None:
    progress = MergedProgress(["a", "b"])
    progress.add_step("a", layer(100))
    assert progress.take_steps() == [layer(50)]
    progress.add_step("b", layer(20))
    assert progress.take_steps() == [layer(60)]
    progress.add_step("b", layer(20))
    assert progress.take_steps() == [], "nothing new"


def test_the_total_of_a_layer_never_changes() -> None:
    progress = MergedProgress(["a", "b"])
    progress.add_step("a", layer(10, total=100))
    progress.add_step("b", layer(500, total=1000))
    assert progress.take_steps() == [layer(55)]


def test_a_status_after_the_layers_waits_for_the_last_node() -> None:
    progress = MergedProgress(["a", "b"])
    for step in (status("pulling manifest"), layer(100), status("verifying")):
        progress.add_step("a", step)
    assert progress.take_steps() == [status("pulling manifest"), layer(50)]
    progress.add_step("b", layer(100))
    progress.add_step("b", status("verifying"))
    assert progress.take_steps() == [layer(100), status("verifying")]


def test_a_node_that_failed_holds_up_no_other_node() -> None:
    progress = MergedProgress(["a", "b"])
    progress.add_step("a", layer(100))
    progress.add_step("a", status("verifying"))
    progress.add_step("b", layer(10))
    progress.mark_failed("b", "disk full")
    assert progress.take_steps() == [layer(100), status("verifying")]
    assert progress.failures == {"b": "disk full"}
    assert repr(progress) == "<MergedProgress 2 nodes, 0 done, 1 failed>"


def test_a_note_of_our_own_is_passed_on_once() -> None:
    progress = MergedProgress(["a"])
    progress.add_note("c is left out")
    assert progress.take_steps() == [status("c is left out")]
    assert progress.take_steps() == []


entries = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["pulling manifest", "pulling 1", "verifying", "success"]) | st.integers(),
        "digest": st.sampled_from(["sha256:1", "sha256:2"]) | st.none(),
        "total": st.integers(-5, 200) | st.text(max_size=3) | st.floats(),
        "completed": st.integers(-5, 300) | st.none(),
        "error": st.just("") | st.just("failed") | st.just({"x": 1}),
    },
)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), entries), max_size=60))
def test_whatever_nodes_say_bars_only_grow_and_nothing_is_passed_on_twice(
    lines: list[tuple[str, dict[str, object]]],
) -> None:
    progress = MergedProgress(["a", "b", "c"])
    steps: list[StoreStep] = []
    for node, entry in lines:
        try:
            step = parse_step(safe_json.dump_compact(entry), node)
        except StoreRefusal as error:
            progress.mark_failed(node, error.message)
        else:
            if step is not None:
                progress.add_step(node, step)
        steps += progress.take_steps()
    statuses = [step.status for step in steps if step.digest is None]
    assert len(statuses) == len(set(statuses))
    assert "success" not in statuses
    for digest in ("sha256:1", "sha256:2"):
        bars = [(step.total_bytes or 0, step.completed_bytes or 0) for step in steps if step.digest == digest]
        assert len({total for total, _ in bars}) <= 1
        assert [done for _, done in bars] == sorted({done for _, done in bars})
        assert all(0 <= done <= total for total, done in bars)


def test_a_node_that_never_ends_naming_layers_fills_no_memory() -> None:
    progress = MergedProgress(["a"])
    for number in range(MAX_STEPS_PER_NODE * 3):
        progress.add_step("a", layer(1, digest=f"sha256:{number}"))
        progress.add_step("a", status(f"status {number}"))
    assert len(progress.take_steps()) <= 2 * MAX_STEPS_PER_NODE
