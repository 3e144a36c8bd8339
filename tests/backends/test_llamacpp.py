"""What llama-server says of itself: answers of build 10434 and of others, and answers that no server should give."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.base import Inventory, ServerLoad
from gpumesh.backends.llamacpp import LlamacppDialect
from gpumesh.errors import ProbeError

DIALECT = LlamacppDialect()
MODELS = {
    "object": "list",
    "data": [{"id": "tiny", "owned_by": "llamacpp", "meta": {"n_ctx": 2048, "n_ctx_train": 4096, "size": 790272}}],
}
PROPS = {"default_generation_settings": {"n_ctx": 4096}, "total_slots": 2, "build_info": "b10434-7e4c0a9"}
SLOTS = [{"id": 0, "n_ctx": 2048, "is_processing": True}, {"id": 1, "n_ctx": 2048, "is_processing": False}]
METRICS = b"llamacpp:requests_processing 1\nllamacpp:requests_deferred 3\n"
LOADING = (503, b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}')
NO_SLOTS = (
    501,
    b'{"error":{"code":501,"message":"This server does not support slots endpoint."}}',
)


def ok(document: Any) -> tuple[int, bytes]:
    return 200, json.dumps(document).encode()


def read(**changes: tuple[int, bytes] | None) -> Inventory:
    answers = {"models": ok(MODELS), "props": ok(PROPS), "slots": ok(SLOTS), "metrics": (200, METRICS)}
    return DIALECT.read_inventory({"health": ok({"status": "ok"}), **answers, **changes})


def test_slots_context_and_load() -> None:
    inventory = read()
    assert (inventory.version, inventory.parallel) == ("b10434-7e4c0a9", 2)
    (loaded,) = inventory.loaded
    assert (loaded.name, loaded.context_length) == ("tiny", 2048), "the context of one slot"
    assert inventory.load == ServerLoad(running=1, waiting=3)


def test_slots_and_metrics_may_be_off() -> None:
    inventory = read(slots=NO_SLOTS, metrics=(501, b""))
    assert inventory.load == ServerLoad()
    assert (inventory.parallel, inventory.loaded[0].context_length) == (2, 4096)
    assert read(slots=None, metrics=(200, METRICS)).load == ServerLoad(running=1, waiting=3)


def test_an_old_build_says_how_full_its_cache_is() -> None:
    assert read(metrics=(200, b"llamacpp:kv_cache_usage_ratio 0.31\n")).load.kv_cache_pct == 31


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"models": LOADING, "props": LOADING}, "backend-down"),
        ({"props": LOADING}, "backend-down"),
        ({"props": (401, b'{"error":{"message":"Invalid API Key"}}')}, "key-refused"),
        ({"props": (404, b"{}")}, "wrong-server"),
        ({"props": ok({"total_slots": 2})}, "wrong-server"),
        ({"props": (200, b'{"total_slots": 2, ')}, "answer-broken"),
    ],
)
def test_what_is_no_inventory(changes: dict[str, tuple[int, bytes]], code: str) -> None:
    with pytest.raises(ProbeError) as error:
        read(**changes)
    assert error.value.finding_code == code


def test_while_it_loads_a_person_is_told_to_wait() -> None:
    with pytest.raises(ProbeError, match="Loading model") as error:
        read(models=LOADING)
    assert "wait until it has loaded its model" in (error.value.hint or "")


def test_it_is_recognized_by_the_owner_of_its_models_and_while_it_loads() -> None:
    assert DIALECT.recognizes(*ok(MODELS))
    assert DIALECT.recognizes(*LOADING)
    assert not DIALECT.recognizes(503, b'{"error":{"message":"overloaded"}}')
    assert not DIALECT.recognizes(503, b'{"error":"Loading model"}')
    assert not DIALECT.recognizes(*ok({"data": [{"id": "m", "owned_by": "vllm"}]}))


def test_the_message_of_an_error() -> None:
    body = b'{"error":{"code":400,"message":"request (9051 tokens) exceeds the available context size (2048 tokens)"}}'
    assert DIALECT.error_text(400, body) == "request (9051 tokens) exceeds the available context size (2048 tokens)"


@given(st.sampled_from(tuple(DIALECT.probe_calls())), st.integers(200, 599), st.binary(max_size=99))
def test_no_answer_is_a_bug(name: str, status: int, body: bytes) -> None:
    try:
        inventory = read(**{name: (status, body)})
    except ProbeError:
        return
    assert inventory.parallel == 2


@pytest.mark.parametrize("slots", [None, 5, {}, [None], [{"n_ctx": "x", "is_processing": 1}], [{"n_ctx": -1}] * 9])
def test_slots_that_no_server_has(slots: Any) -> None:
    assert read(slots=ok(slots), metrics=None).loaded[0].context_length == 4096
