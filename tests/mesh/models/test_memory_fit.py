from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.mesh.models.memory_fit import SIZES, Fit, find_largest_fits, format_fits
from gpumesh.state import BackendPhase, BackendState, Health, NodeState
from tests.cli.states import down, gpu, healthy, mesh


def with_free(name: str, *free_mib: int | None) -> NodeState:
    cards = tuple(
        replace(gpu(index), uuid=f"GPU-{name}-{index}", memory_free_mib=free, memory_used_mib=None)
        for index, free in enumerate(free_mib)
    )
    return replace(healthy(name), gpus=cards)


def test_sizes_are_in_descending_order() -> None:
    assert [size.need_mib for size in SIZES] == sorted((size.need_mib for size in SIZES), reverse=True)


def test_the_largest_fit_and_the_next_one_on_more_nodes() -> None:
    state = mesh(with_free("a", 24_000), with_free("b", 12_000), with_free("c", 11_000))
    assert find_largest_fits(state) == (Fit("32B", 1), Fit("14B", 3))
    assert format_fits(find_largest_fits(state)) == "a 32B Q4 fits on 1 node, a 14B on 3"


def test_a_host_splits_a_model_over_its_gpus() -> None:
    assert find_largest_fits(mesh(with_free("two", 23_000, 23_000))) == (Fit("70B", 1),)


def test_a_gpu_of_two_nodes_counts_once() -> None:
    one = with_free("a", 11_000)
    assert find_largest_fits(mesh(one, replace(one, name="b"))) == (Fit("14B", 1),)


@pytest.mark.parametrize(
    "node",
    [
        down("x"),
        replace(with_free("x", 24_000), health=Health.DRAINING),
        replace(with_free("x", 24_000), backend=BackendState("ollama", BackendPhase.DOWN)),
        with_free("x", None),
        healthy("x", gpus=()),
    ],
)
def test_a_node_that_cannot_load_a_model_does_not_count(node: NodeState) -> None:
    assert find_largest_fits(mesh(node)) == ()
    assert format_fits(find_largest_fits(mesh(node))) is None


def test_no_size_fits() -> None:
    assert format_fits(find_largest_fits(mesh(with_free("full", 300)))) == "no model fits now"


def test_sizes_have_the_right_article() -> None:
    assert format_fits((Fit("8B", 2),)) == "an 8B Q4 fits on 2 nodes"
    assert format_fits((Fit("14B", 1), Fit("8B", 2))) == "a 14B Q4 fits on 1 node, an 8B on 2"
