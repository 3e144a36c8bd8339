from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given

from gpumesh.cli.views.download_bars import format_step
from gpumesh.mesh.models.store_answers import (
    StoreRefusal,
    StoreStep,
    parse_context_length,
    parse_document,
    parse_step,
)
from tests.absurd_answers import ABSURD, DEEP, json_bytes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"error": "\\u001b[31mno space left on device"}', "no space left on device"),
        (b'{"error": {"a": 1}}', "an error without words"),
        (b'{"error": {"message": "nested"}}', "nested"),
    ],
)
def test_a_line_that_says_an_error_is_a_refusal(line: bytes, message: str) -> None:
    with pytest.raises(StoreRefusal) as caught:
        parse_step(line, "alpha")
    assert (caught.value.message, caught.value.node, caught.value.status) == (message, "alpha", None)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"error": "model not found"}', 404, "model not found"),
        (b"<html><title>nope</title></html>", 502, 'HTTP 502 and a web page, "nope"'),
        (b"nope", 502, "nope"),
        (b"", 500, "HTTP 500 without a word"),
        (b'{"error": "cut"}', 200, "cut"),
    ],
)
def test_a_document_that_says_an_error_is_a_refusal(body: bytes, status: int, message: str) -> None:
    with pytest.raises(StoreRefusal) as caught:
        parse_document(status, body, "alpha")
    assert caught.value.message == message


def test_the_refusal_of_a_full_disk_says_what_to_do() -> None:
    with pytest.raises(StoreRefusal) as caught:
        parse_step(b'{"error": "write /root/.ollama/x: no space left on device"}', "alpha")
    assert "its disk is full" in str(caught.value.hint)


@pytest.mark.parametrize("line", [b"", b" \r", b"not json", b"[1]", b"5", b"[" * 100_000, b'{"status": 1}'])
def test_a_line_that_says_nothing_is_no_step(line: bytes) -> None:
    assert parse_step(line, "alpha") is None


@pytest.mark.parametrize(
    ("line", "step"),
    [
        (
            b'{"status": "pulling", "digest": "d", "total": 10, "completed": 4}',
            StoreStep("pulling", "d", 4, 10),
        ),
        (b'{"status": "pulling", "total": 10, "completed": 4}', StoreStep("pulling", None, 4, 10)),
        (b'{"status": "pulling", "total": 10}', StoreStep("pulling", None, 0, 10)),
        (b'{"status": "pulling", "total": 10, "completed": 99}', StoreStep("pulling", None, 10, 10)),
        (b'{"status": "pulling", "digest": "d", "total": 0, "completed": 0}', StoreStep("pulling")),
        (b'{"status": "a\\u001b[2Jb", "total": "x"}', StoreStep("ab")),
    ],
)
def test_steps(line: bytes, step: StoreStep) -> None:
    assert parse_step(line, "alpha") == step


def test_context_lengths() -> None:
    assert parse_context_length({"model_info": {"qwen2.context_length": 32768, "general.name": "x"}}) == 32768
    assert parse_context_length({"model_info": {"a.context_length": True, "b.context_length": "x"}}) is None
    assert parse_context_length({"model_info": None}) is None


@given(ABSURD)
@example({"status": "pulling", "total": 1, "completed": 10**400})
@example({"status": "pulling", "total": 10**400, "completed": 10**400})
@example({"status": "pulling", "total": True, "completed": False})
@example({"error": DEEP})
@example({"model_info": {"x.context_length": 10**400}})
def test_no_answer_of_a_server_raises_but_as_its_error(document: Any) -> None:
    body = json_bytes(document)
    try:
        step = parse_step(body, "alpha")
        length = parse_context_length(parse_document(200, body, "alpha"))
    except StoreRefusal as error:
        assert error.message.isprintable()
        return
    if step is not None:
        assert format_step(step).isprintable()
    assert length is None or 0 < length <= 1 << 31
