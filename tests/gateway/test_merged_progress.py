from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gpumesh.gateway.merged_progress import MAX_LINES_PER_NODE, MergedProgress


def layer(completed: int, *, total: int = 100, digest: str = "sha256:1") -> dict[str, Any]:
    return {"status": "pulling 1", "digest": digest, "total": total, "completed": completed}


def said(status: str) -> dict[str, Any]:
    return {"status": status}


def test_one_nodes_progress_is_its_own() -> None:
    progress = MergedProgress(["a"])
    told = []
    for entry in (said("pulling manifest"), layer(0), layer(50), layer(100), said("writing manifest"), said("success")):
        progress.feed_line("a", entry)
        told += progress.take_lines()
    assert told == [said("pulling manifest"), layer(0), layer(50), layer(100), said("writing manifest")]
    assert progress.done == ("a",)


def test_a_layer_is_as_far_as_the_nodes_are_on_average() -> None:
    progress = MergedProgress(["a", "b"])
    progress.feed_line("a", layer(100))
    assert progress.take_lines() == [layer(50)]
    progress.feed_line("b", layer(20))
    assert progress.take_lines() == [layer(60)]
    progress.feed_line("b", layer(20))
    assert progress.take_lines() == [], "nothing new"


def test_the_total_is_said_once_and_for_all() -> None:
    progress = MergedProgress(["a", "b"])
    progress.feed_line("a", layer(10, total=100))
    progress.feed_line("b", layer(500, total=1000))
    assert progress.take_lines() == [layer(55)]


def test_what_comes_after_the_layers_waits_for_the_last() -> None:
    progress = MergedProgress(["a", "b"])
    for entry in (said("pulling manifest"), layer(100), said("verifying")):
        progress.feed_line("a", entry)
    assert progress.take_lines() == [said("pulling manifest"), layer(50)]
    progress.feed_line("b", layer(100))
    progress.feed_line("b", said("verifying"))
    assert progress.take_lines() == [layer(100), said("verifying")]


def test_a_node_that_failed_holds_up_nobody() -> None:
    progress = MergedProgress(["a", "b"])
    progress.feed_line("a", layer(100))
    progress.feed_line("a", said("verifying"))
    progress.feed_line("b", layer(10))
    progress.feed_line("b", {"error": "disk full \x1b[31m"})
    assert progress.take_lines() == [layer(100), said("verifying")]
    assert progress.failures == {"b": "disk full"}


def test_a_note_of_our_own() -> None:
    progress = MergedProgress(["a"])
    progress.add_note("c is left out")
    assert progress.take_lines() == [said("c is left out")]
    assert progress.take_lines() == []


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
def test_whatever_nodes_say_bars_only_grow_and_nothing_is_told_twice(steps: list[tuple[str, dict[str, Any]]]) -> None:
    progress = MergedProgress(["a", "b", "c"])
    told: list[dict[str, Any]] = []
    for node, entry in steps:
        progress.feed_line(node, entry)
        told += progress.take_lines()
    plain = [line["status"] for line in told if "digest" not in line]
    assert len(plain) == len(set(plain))
    assert "success" not in plain
    for digest in ("sha256:1", "sha256:2"):
        bars = [(line["total"], line["completed"]) for line in told if line.get("digest") == digest]
        assert len({total for total, _ in bars}) <= 1
        assert [done for _, done in bars] == sorted({done for _, done in bars})
        assert all(0 <= done <= total for total, done in bars)


def test_a_node_that_never_ends_naming_layers_fills_no_memory() -> None:
    progress = MergedProgress(["a"])
    for number in range(MAX_LINES_PER_NODE * 3):
        progress.feed_line("a", layer(1, digest=f"sha256:{number}"))
        progress.feed_line("a", said(f"words {number}"))
    assert len(progress.take_lines()) <= 2 * MAX_LINES_PER_NODE
