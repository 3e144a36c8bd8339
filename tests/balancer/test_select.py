from collections.abc import Iterable

import pytest

from gpumesh.balancer.account import GpuGroup, NodeAccount
from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.outcomes import Blame
from gpumesh.balancer.select import has_model, no_node_error
from gpumesh.errors import ModelMissing, NoNodeError
from gpumesh.topology import BackendKind, PolicyKind
from tests.balancer.scheduling.fleets import NOW, A, B, ask, make_node, make_scheduler


def node(name: str, **given: object) -> Candidate:
    fields: dict[str, object] = {"kind": BackendKind.OLLAMA, "usable": True, "models": frozenset({"m:latest"})}
    return Candidate(name=name, **{**fields, **given})  # type: ignore[arg-type]


# -- which nodes can serve ---------------------------------------------------------------------------------------------


def names(accounts: Iterable[NodeAccount]) -> set[str]:
    return {account.name for account in accounts}


def test_only_nodes_that_are_up_and_speak_the_api_and_have_the_model_are_selected() -> None:
    scheduler = make_scheduler()
    for name in ("good", "full"):
        make_node(scheduler, name)
    make_node(scheduler, "down").is_up = False
    make_node(scheduler, "other", models={B})
    make_node(scheduler, "openai").kind = BackendKind.OPENAI
    make_node(scheduler, "unlisted", models=None)
    tripped = make_node(scheduler, "tripped")
    tripped.breaker = tripped.breaker.trip(NOW)
    unloadable = make_node(scheduler, "unloadable")
    unloadable.model_breakers.record_failure(A, Blame.MODEL_LOAD, "out of memory", NOW)
    demand = ask("A", kinds=frozenset({BackendKind.OLLAMA}))
    scheduler.accounts["full"].group.others_in_flight = 9
    assert names(scheduler.choice.select(demand, NOW)) == {"good", "full", "unlisted"}, (
        "a full node could serve it later"
    )
    assert names(scheduler.choice.select(demand, NOW, despite_breaker=True)) == {"good", "full", "unlisted", "tripped"}
    assert names(scheduler.choice.select(ask("b"), NOW)) >= {"unloadable", "other", "openai"}


def test_a_node_at_its_limit_is_busy_and_the_load_of_a_gpu_counts_for_all_its_nodes() -> None:
    scheduler = make_scheduler(PolicyKind.LEAST_LOADED)
    one, other, apart = (make_node(scheduler, name, slots=2) for name in ("one", "other", "apart"))
    one.group = other.group = GpuGroup("gpu", (one, other))
    for node_name in ("one", "other", "apart"):
        assert scheduler.place_now(ask(node=node_name), NOW) is not None
    assert (one.count(), other.count(), apart.count()) == (2, 2, 1)
    assert scheduler.place_now(ask(node="one"), NOW) is None
    assert scheduler.place_now(ask(node="other"), NOW) is None
    placement = scheduler.place_now(ask(), NOW)
    assert placement is not None
    assert placement.placed.account is apart


def test_a_request_about_the_model_store_is_never_kept_from_a_broken_model() -> None:
    scheduler = make_scheduler()
    full = make_node(scheduler, "full", slots=1)
    full.model_breakers.record_failure(A, Blame.MODEL_LOAD, "out of memory", NOW)
    assert names(scheduler.choice.select(ask(needs_slot=False), NOW)) == {"full"}
    assert names(scheduler.choice.select(ask(), NOW)) == set()


def test_a_node_that_failed_this_request_is_left_out() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "a")
    assert scheduler.choice.select(ask(), NOW, exclude={"a"}) == []
    assert scheduler.place_now(ask(), NOW, exclude={"a"}) is None


def test_only_the_nodes_that_client_and_rules_allow_are_selected() -> None:
    scheduler = make_scheduler()
    for name in "abc":
        make_node(scheduler, name)
    assert names(scheduler.choice.select(ask(node="b"), NOW)) == {"b"}
    assert names(scheduler.choice.select(ask(nodes=frozenset("ac")), NOW)) == {"a", "c"}
    assert names(scheduler.choice.select(ask(node="b", nodes=frozenset("ac")), NOW)) == set()


# -- why none can ------------------------------------------------------------------------------------------------------


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


def test_the_error_of_a_missing_model_names_the_models_there_are() -> None:
    nodes = [
        node("a"),
        node("away", usable=False),
        node("disabled", usable=False, models=None, enabled=False),
        node("vllm", usable=False, kind=BackendKind.VLLM, models=frozenset({"big:70b"})),
    ]
    error = no_node_error(nodes, Demand("big:70b", frozenset({BackendKind.OLLAMA})))
    assert isinstance(error, ModelMissing)
    assert error.hint is not None
    assert "m:latest" in error.hint
    assert "pulled to a:" in error.hint
    assert error.available == ("m:latest",)


@pytest.mark.parametrize("kind", [BackendKind.OLLAMA, BackendKind.AUTO])
@pytest.mark.parametrize(
    ("models", "message"),
    [
        (frozenset({"big:70b"}), "'big:70b' is on away, which cannot be used now"),
        (None, "no node that is up has the model 'big:70b', and away could not be asked for it yet"),
    ],
)
def test_a_model_that_a_node_has_or_may_have_is_not_missing_while_that_node_is_away(
    kind: BackendKind, models: frozenset[str] | None, message: str
) -> None:
    nodes = [
        node("a"),
        node("vllm", kind=BackendKind.VLLM, models=frozenset({"big:70b"})),
        node("away", usable=False, kind=kind, models=models),
    ]
    error = no_node_error(nodes, Demand("big:70b", frozenset({BackendKind.OLLAMA})))
    assert (type(error), error.message) == (NoNodeError, message)


def test_the_error_of_a_model_that_only_a_server_of_another_kind_has_names_that_server() -> None:
    nodes = [node("ollama"), node("vllm", kind=BackendKind.VLLM, models=frozenset({"big:70b"}))]
    error = no_node_error(nodes, Demand("big:70b", frozenset({BackendKind.OLLAMA})))
    assert isinstance(error, ModelMissing)
    assert error.available == ("m:latest",)
    assert error.hint is not None
    assert error.hint.startswith("it is on vllm (kind vllm), which cannot serve this API; there are: m")
    assert "pulled to ollama:" in error.hint


def test_the_error_names_the_nodes_that_have_failed_the_request() -> None:
    error = no_node_error([node("a"), node("b", models=frozenset())], Demand("m"), exclude={"a"})
    assert (type(error), error.message) == (NoNodeError, "every node that could serve this has failed it (a)")


def test_a_demand_without_a_model_is_met_by_every_node() -> None:
    assert has_model(node("a"), None)
