import pytest

from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.select import group_loads, has_model, no_node_error, select_candidates
from gpumesh.errors import ModelMissing, NoNodeError
from gpumesh.topology import BackendKind


def node(name: str, **given: object) -> Candidate:
    fields: dict[str, object] = {"kind": BackendKind.OLLAMA, "usable": True, "models": frozenset({"m:latest"})}
    return Candidate(name=name, **{**fields, **given})  # type: ignore[arg-type]


def test_only_nodes_that_are_up_and_speak_the_api_and_have_the_model_are_selected() -> None:
    nodes = [
        node("good"),
        node("down", usable=False),
        node("other", models=frozenset({"n:latest"})),
        node("openai", kind=BackendKind.OPENAI),
        node("unlisted", models=None),
    ]
    selection = select_candidates(nodes, Demand("M", frozenset({BackendKind.OLLAMA})))
    assert {candidate.name for candidate in selection.free} == {"good", "unlisted"}
    assert selection.busy == ()


def test_a_node_at_its_limit_is_busy_and_the_load_of_a_gpu_counts_for_all_its_nodes() -> None:
    nodes = [
        node("a", in_flight=1, limit=2, group="gpu1"),
        node("b", in_flight=1, limit=2, group="gpu1"),
        node("c", in_flight=1, limit=2),
    ]
    assert group_loads(nodes) == {"gpu1": 2, "c": 1}
    selection = select_candidates(nodes, Demand("m"))
    assert [candidate.name for candidate in selection.free] == ["c"]
    assert {candidate.name for candidate in selection.busy} == {"a", "b"}


def test_a_request_without_inference_needs_no_slot() -> None:
    full = [node("a", in_flight=5, limit=1)]
    assert select_candidates(full, Demand("m", needs_slot=False)).free == tuple(full)


def test_a_node_that_failed_this_request_is_left_out() -> None:
    assert select_candidates([node("a")], Demand("m"), exclude={"a"}).free == ()


@pytest.mark.parametrize(
    ("demand", "kind", "message"),
    [
        (Demand("m", node="nowhere"), NoNodeError, "no node 'nowhere'"),
        (Demand("m", node="down"), NoNodeError, "'down' is not usable"),
        (Demand("absent"), ModelMissing, "absent"),
        (Demand("m", frozenset({BackendKind.OPENAI})), NoNodeError, "speaks this API"),
    ],
)
def test_the_error_gives_the_true_reason_why_no_node_can_serve(
    demand: Demand, kind: type[Exception], message: str
) -> None:
    error = no_node_error([node("a"), node("down", usable=False)], demand)
    assert type(error) is kind
    assert message in error.message


def test_the_error_of_a_missing_model_names_the_models_there_are_and_nodes_that_would_have_it() -> None:
    nodes = [node("a"), node("away", usable=False, models=frozenset({"big:70b"}))]
    error = no_node_error(nodes, Demand("big:70b"))
    assert isinstance(error, ModelMissing)
    assert error.hint is not None
    assert "away" in error.hint
    assert "m:latest" in error.hint
    assert "pulled to a:" in error.hint
    assert error.available == ("m:latest",)


def test_the_error_of_a_model_that_only_a_server_of_another_kind_has_names_that_server() -> None:
    nodes = [
        node("ollama"),
        node("vllm", kind=BackendKind.VLLM, models=frozenset({"big:70b"})),
        node("away", usable=False, models=frozenset({"big:70b"})),
    ]
    error = no_node_error(nodes, Demand("big:70b", frozenset({BackendKind.OLLAMA})))
    assert isinstance(error, ModelMissing)
    assert error.available == ("m:latest",)
    assert error.hint is not None
    assert error.hint.startswith(
        "it is on away, which cannot be used now; it is on vllm (kind vllm), which cannot serve this API; there are: m"
    )
    assert "pulled to ollama:" in error.hint


def test_the_error_names_the_nodes_that_have_failed_the_request() -> None:
    error = no_node_error([node("a"), node("b", models=frozenset())], Demand("m"), exclude={"a"})
    assert (type(error), error.message) == (NoNodeError, "every node that could serve this has failed it (a)")


def test_a_demand_without_a_model_is_met_by_every_node() -> None:
    assert has_model(node("a"), None)
