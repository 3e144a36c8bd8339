from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends import error_text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error":"model \'x\' not found"}', "model 'x' not found"),
        (b'{"error":{"message":"no such model","type":"not_found_error"}}', "no such model"),
        (b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}', "Overloaded"),
        (b'{"detail":[{"loc":["body"],"msg":"field required","type":"value_error"}]}', "field required"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"message":"Unauthorized"}', "Unauthorized"),
        (b'{"error":{"type":"api_error"}}', "api_error"),
        (b'[{"error":{"message":"in a list"}}]', "in a list"),
        (b'"just text"', "just text"),
        (b"plain words\nof two lines", "plain words of two lines"),
        (b"", "HTTP 500 without a word"),
        (b" \n ", "HTTP 500 without a word"),
        (b"<html><TITLE lang=en>502 Bad\nGateway</TITLE></html>", 'HTTP 500 and a web page, "502 Bad Gateway"'),
        (b"<!doctype html><p>no title", "HTTP 500 and a web page"),
        (b"\x00\x01\x02", "HTTP 500"),
        (b'{"error":""}', '{"error":""}'),
        (b'{"error":"\\u001b[31mred\\u001b[0m \\u202e"}', "red"),
    ],
)
def test_a_servers_own_words(body: bytes, said: str) -> None:
    assert error_text.error_text(500, body) == said


def test_long_words_are_cut_to_a_line() -> None:
    said = error_text.error_text(500, b"x" * 100_000)
    assert len(said) <= 300
    assert said.endswith("…")


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ({"error": "x"}, "x"),
        ({"error": {"message": "y"}}, "y"),
        ({"error": {"code": 500}}, "an error without words"),
        ({"error": [1]}, "an error without words"),
        ({"error": True}, "an error without words"),
        ({"error": None}, None),
        ({"error": ""}, None),
        ({"message": "no error"}, None),
        ({}, None),
    ],
)
def test_an_error_under_status_200(frame: dict[str, Any], said: str | None) -> None:
    assert error_text.find_error_message(frame) == said


@given(st.binary(max_size=300), st.integers(100, 599))
def test_any_body_gives_a_line(body: bytes, status: int) -> None:
    said = error_text.error_text(status, body)
    assert said
    assert said.isprintable()
    assert len(said) <= 320


DEEP: Any = st.recursive(
    st.none() | st.text(max_size=9) | st.integers(),
    lambda inner: (
        st.dictionaries(st.sampled_from(("error", "message", "detail", "msg", "type", "x")), inner)
        | st.lists(inner, max_size=2)
    ),
)


@given(DEEP)
def test_any_shape_gives_a_line(document: Any) -> None:
    assert error_text.error_text(400, json.dumps(document).encode()).isprintable()
    if isinstance(document, dict):
        assert (error_text.find_error_message(document) or "").isprintable()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error":"no memory"}', "no memory"),
        (b'{"error":{"message":"upstream","code":502}}', "upstream"),
        (b'{"error":"x","message":"also a text"}', "x"),
        (b'{"error":null,"id":"r"}', None),
        (b'{"error":"x","choices":[]}', None),
        (b'{"error":"x","message":{"role":"assistant","content":""}}', None),
        (b'{"response":"the \\"error\\" is"}', None),
        (b'["error"]', None),
        (b'{"error":', None),
        (b'{"error":"' + b"x" * error_text.ERROR_BYTES + b'"}', None),
    ],
)
def test_an_error_that_is_reported_with_the_status_of_a_success(body: bytes, said: str | None) -> None:
    assert error_text.find_reported_error(body) == said


@given(st.binary(max_size=300) | DEEP.map(lambda document: json.dumps(document).encode()))
def test_any_body_may_report_an_error(body: bytes) -> None:
    assert (error_text.find_reported_error(body) or "").isprintable()
