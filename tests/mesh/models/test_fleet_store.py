"""The results of operations over several nodes. tests/gateway/test_model_store_routes.py runs the operations."""

from __future__ import annotations

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.errors import NoNodeError
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.models.fleet_store import FleetStore, OperationResult, StoreOperation, is_done_where_possible
from gpumesh.mesh.models.store_answers import NodeResult, failed_result
from gpumesh.topology import BackendSpec, NodeSpec, Topology


def result(node: str, status: int) -> NodeResult:
    return NodeResult(node, status)


@pytest.mark.parametrize(
    ("results", "done"),
    [
        ([result("a", 200), result("b", 200)], True),
        ([result("a", 200), result("b", 404)], True),
        ([result("a", 404), result("b", 404)], False),
        ([result("a", 200), result("b", 500)], False),
        ([result("a", 200), failed_result("b", NoNodeError("it cannot be reached now"))], False),
    ],
)
def test_a_change_is_done_where_the_model_was(results: list[NodeResult], done: bool) -> None:
    assert is_done_where_possible(results) is done


def test_the_common_failure_is_that_of_all_nodes() -> None:
    assert OperationResult(("a", "b"), (), {"a": "no", "b": "no"}).common_failure == "no"
    assert OperationResult(("a", "b"), (), {"a": "no", "b": "full"}).common_failure is None
    assert OperationResult(("a", "b"), ("b",), {"a": "no"}).common_failure is None
    assert OperationResult(("a",), ("a",), {}).common_failure is None


def test_without_a_usable_node_there_is_no_operation() -> None:
    mesh = Mesh(Topology("t", (NodeSpec("a", BackendSpec()),)))
    store = FleetStore(mesh)
    with pytest.raises(NoNodeError):
        store.start_pull(HttpCall("POST", "/api/pull"), None, timeout_s=1.0)
    operation = StoreOperation(mesh, ["a"], HttpCall("POST", "/api/pull"))
    assert repr(operation) == "<StoreOperation /api/pull <MergedProgress 1 nodes, 0 done, 0 failed>>"
