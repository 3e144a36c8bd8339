from __future__ import annotations

from gpumesh.mesh.requests.route_gaps import KNOWN_S, MAX_GAPS, RouteGaps


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_a_gap_is_known_for_a_while() -> None:
    clock = Clock()
    gaps = RouteGaps(clock)
    gaps.add("/v1/rerank?x=1", "a")
    clock.now += KNOWN_S / 2
    gaps.add("/v1/rerank", "b")
    assert gaps.find_nodes("/v1/rerank?y=2") == {"a", "b"}
    assert gaps.find_nodes("/v1/score") == frozenset()
    clock.now += KNOWN_S / 2
    assert gaps.find_nodes("/v1/rerank") == {"b"}


def test_clients_that_choose_paths_fill_no_memory() -> None:
    gaps = RouteGaps(Clock())
    for number in range(3 * MAX_GAPS):
        gaps.add(f"/v1/{number}", "a")
    assert gaps.find_nodes(f"/v1/{3 * MAX_GAPS - 1}") == {"a"}
    assert gaps.find_nodes("/v1/0") == frozenset()
    assert repr(gaps) == f"<RouteGaps {MAX_GAPS}>"
