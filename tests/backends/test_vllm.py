"""What vLLM says of itself: answers as its source gives them, and answers that no server should give."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.base import Inventory, ServerLoad
from gpumesh.backends.vllm import VllmDialect
from gpumesh.errors import ProbeError

DIALECT = VllmDialect()
MODELS = {
    "object": "list",
    "data": [
        {"id": "qwen", "owned_by": "vllm", "root": "/models/qwen", "parent": None, "max_model_len": 32768},
        {"id": "lora", "owned_by": "vllm", "root": "/models/lora", "parent": "qwen"},
    ],
}
METRICS = (
    b'vllm:num_requests_running{engine="0",model_name="qwen"} 12.0\n'
    b'vllm:num_requests_waiting{engine="0",model_name="qwen"} 5.0\n'
    b'vllm:kv_cache_usage_perc{engine="0",model_name="qwen"} 0.913\n'
)


def ok(document: Any) -> tuple[int, bytes]:
    return 200, json.dumps(document).encode()


def read(**changes: tuple[int, bytes] | None) -> Inventory:
    answers = {"models": ok(MODELS), "health": (200, b""), "version": ok({"version": "0.11.0"})}
    return DIALECT.read_inventory({**answers, "metrics": (200, METRICS), **changes})


def test_models_context_and_load() -> None:
    inventory = read()
    assert (inventory.version, inventory.parallel) == ("0.11.0", None)
    assert [(model.name, model.context_length) for model in inventory.loaded] == [("qwen", 32768), ("lora", None)]
    assert inventory.load == ServerLoad(running=12, waiting=5, kv_cache_pct=91)


def test_the_cache_has_another_name_in_older_versions() -> None:
    assert read(metrics=(200, b'vllm:gpu_cache_usage_perc{model_name="m"} 0.5\n')).load == ServerLoad(kv_cache_pct=50)


@pytest.mark.parametrize("metrics", [None, (404, METRICS), (200, b"")])
def test_metrics_may_be_off(metrics: tuple[int, bytes] | None) -> None:
    assert read(metrics=metrics).load == ServerLoad()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"models": (401, b'{"error":"Unauthorized"}')}, "key-refused"),
        ({"models": (503, b'{"error":"The model is currently scaling. Please try again later."}')}, "backend-down"),
        ({"health": (503, b"")}, "backend-down"),
        ({"models": ok({"data": [{"id": "m", "owned_by": "llamacpp"}]})}, "wrong-server"),
        ({"models": ok({"data": []})}, "wrong-server"),
        ({"models": (404, b'{"detail":"Not Found"}')}, "wrong-server"),
    ],
)
def test_what_is_no_inventory(changes: dict[str, tuple[int, bytes]], code: str) -> None:
    with pytest.raises(ProbeError) as error:
        read(**changes)
    assert error.value.finding_code == code


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","param":null,"code":404}}',
         "The model `x` does not exist."),
        (b'{"object":"error","message":"too long","type":"BadRequestError","param":null,"code":400}', "too long"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"detail":"Not Found"}', "Not Found"),
    ],
    ids=["since 0.10", "before 0.10", "a missing key", "an unknown path"],
)  # fmt: skip
def test_the_message_of_an_error(body: bytes, text: str) -> None:
    assert DIALECT.error_text(400, body) == text


@given(st.sampled_from(tuple(DIALECT.probe_calls())), st.integers(200, 599), st.binary(max_size=99))
def test_no_answer_is_a_bug(name: str, status: int, body: bytes) -> None:
    try:
        read(**{name: (status, body)})
    except ProbeError:
        return
