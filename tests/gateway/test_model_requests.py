import contextlib
import json
from collections.abc import Generator, Mapping
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.base import Demand, Priority, ResidencyKey
from gpumesh.gateway.body_parsers.json_members import Members, read_small_members, scan_members
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.model_requests import (
    ALL_KINDS,
    MODEL_ROUTES,
    OLLAMA_ONLY,
    ClientApi,
    ModelRoute,
    find_client_api,
    read_demand,
    read_model,
    read_node,
    read_options,
    read_priority,
    read_timeout,
)
from gpumesh.topology import BackendSpec, NodeSpec, Topology

T = TypeVar("T")
CHAT = MODEL_ROUTES["/api/chat"]


def demand_of(
    route: ModelRoute,
    given: bytes,
    headers: Mapping[str, str] | None = None,
    *,
    default_model: str | None = None,
    node: str | None = None,
    request_id: str | None = None,
) -> Demand:
    members = members_of(given)
    return read_demand(
        route,
        headers or {},
        members,
        size=len(given),
        model=read_model(route, members) or default_model,
        node=node,
        request_id=request_id,
    )


def members_of(given: bytes) -> Members:
    return read_small_members(given) or ended(scan_members(given))


def ended(work: Generator[None, None, T]) -> T:
    """The result of work that is done in pieces."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def body(**document: object) -> bytes:
    return json.dumps(document).encode()


def test_the_demand_of_an_ollama_request() -> None:
    headers = {"x-gpumesh-session": "s1", "x-gpumesh-priority": "Batch"}
    asked = body(model="qwen2.5:7b", options={"num_predict": 64})
    demand = demand_of(CHAT, asked, headers, node="iceland", request_id="r1")
    assert demand.model == "qwen2.5:7b"
    assert demand.kinds == OLLAMA_ONLY
    assert (demand.node, demand.session, demand.priority) == ("iceland", "s1", Priority.BATCH)
    assert demand.id == "r1"
    assert demand.max_tokens == 64


@pytest.mark.parametrize(
    ("path", "stream", "is_whole_text"),
    [
        ("/api/chat", {}, False),
        ("/api/chat", {"stream": None}, False),
        ("/api/chat", {"stream": False}, True),
        ("/api/embed", {}, False),
        ("/v1/chat/completions", {}, True),
        ("/v1/chat/completions", {"stream": True}, False),
        ("/v1/chat/completions", {"stream": "a text that is longer"}, True),
        ("/v1/messages", {"stream": False}, True),
        ("/v1/embeddings", {"stream": False}, False),
        ("/v1/rerank", {}, False),
    ],
)
def test_a_text_in_one_piece_is_told_from_a_stream(path: str, stream: dict[str, object], is_whole_text: bool) -> None:
    members = members_of(body(model="a", **stream))
    demand = read_demand(MODEL_ROUTES.get(path, CHAT), {}, members, size=10, model="a", path=path)
    assert demand.is_whole_text is is_whole_text


def test_openai_routes_go_to_every_kind() -> None:
    demand = demand_of(MODEL_ROUTES["/v1/chat/completions"], body(model="m", max_completion_tokens=9))
    assert demand.kinds == ALL_KINDS
    assert demand.max_tokens == 9


def test_the_default_model_is_used_where_none_is_named_and_show_may_say_name() -> None:
    assert demand_of(CHAT, body(messages=[]), default_model="d").model == "d"
    assert read_model(CHAT, members_of(body(messages=[]))) is None
    shown = demand_of(MODEL_ROUTES["/api/show"], body(name="n"))
    assert shown.model == "n"
    assert not shown.needs_slot


@pytest.mark.parametrize(
    ("given_body", "message"),
    [
        (b"", "missing request body"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "model is required"),
        (b'{"model": 7}', "model is required"),
        (b'{"model": "  "}', "model is required"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_body_that_no_server_could_answer_is_refused(given_body: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as refused:
        demand_of(CHAT, given_body)
    assert refused.value.status == 400


@given(st.binary(max_size=200))
def test_any_body_gives_a_demand_or_a_refusal(given_body: bytes) -> None:
    with contextlib.suppress(BadRequest):
        demand_of(CHAT, given_body, default_model="d")


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "1e9", ""])
def test_a_timeout_is_a_number_of_seconds_up_to_a_day(value: str) -> None:
    with pytest.raises(BadRequest):
        read_timeout({"x-gpumesh-timeout": value}, 1.0)


def test_a_named_node_must_be_in_the_mesh() -> None:
    nodes = tuple(NodeSpec(name, BackendSpec()) for name in ("iceland", "local"))
    topology = Topology("t", nodes)
    assert read_node({}, topology) is None
    assert read_node({"x-gpumesh-node": "local"}, topology) == "local"
    with pytest.raises(BadRequest, match="iceland, local") as refused:
        read_node({"x-gpumesh-node": "secret-word"}, topology)
    assert "secret-word" not in refused.value.message


def test_timeouts_and_priorities_are_read() -> None:
    assert read_timeout({"x-gpumesh-timeout": "2.5s"}, 1.0) == 2.5
    assert read_timeout({}, 600.0) == 600.0
    assert read_priority({}) is Priority.NORMAL
    with pytest.raises(BadRequest, match="interactive, normal, batch"):
        read_priority({"x-gpumesh-priority": "urgent"})


def test_the_api_follows_from_the_path() -> None:
    assert find_client_api("/api/whatever") is ClientApi.OLLAMA
    assert find_client_api("/v1/whatever") is ClientApi.OPENAI
    assert find_client_api("/v1/messages") is ClientApi.ANTHROPIC


@pytest.mark.parametrize(
    ("options", "residency"),
    [
        (None, ResidencyKey("m:latest")),
        ({}, ResidencyKey("m:latest")),
        ({"num_ctx": 4096, "temperature": 1}, ResidencyKey("m:latest", 4096)),
        ({"num_ctx": 4096.0}, ResidencyKey("m:latest", 4096)),
        ({"num_ctx": 0}, ResidencyKey("m:latest")),
        ({"num_ctx": -5}, ResidencyKey("m:latest")),
        ({"num_ctx": 1 << 60}, ResidencyKey("m:latest")),
        ({"num_ctx": "4096"}, ResidencyKey("m:latest")),
        ({"num_ctx": [1]}, ResidencyKey("m:latest")),
        (
            {"use_mmap": False, "num_gpu": 99, "num_batch": 512, "num_thread": 8, "main_gpu": 1},
            ResidencyKey(
                "m:latest",
                None,
                (("main_gpu", 1), ("num_batch", 512), ("num_gpu", 99), ("num_thread", 8), ("use_mmap", False)),
            ),
        ),
        ({"num_gpu": [], "num_batch": {}, "num_thread": "8", "main_gpu": 1e300}, ResidencyKey("m:latest")),
    ],
)
def test_what_a_model_must_be_loaded_with(options: object, residency: ResidencyKey) -> None:
    demand = demand_of(CHAT, body(model="M", options=options))
    assert demand.residency == residency
    assert hash(demand) == hash(demand), "whatever a client sends"


@pytest.mark.parametrize("options", [b"[]", b'{"num_ctx": NaN}', b'{"num_ctx": 4096', b'"x"'])
def test_options_that_cannot_be_read_are_left_to_the_server(options: bytes) -> None:
    assert read_options(options).residency_key("m") == ResidencyKey("m:latest")


def test_a_request_without_inference_loads_nothing() -> None:
    assert demand_of(MODEL_ROUTES["/api/show"], body(model="m")).residency is None


def test_the_class_of_a_request_that_asks_for_none() -> None:
    assert read_priority({}, Priority.BATCH) is Priority.BATCH
    assert read_priority({"x-gpumesh-priority": "interactive"}, Priority.BATCH) is Priority.INTERACTIVE
