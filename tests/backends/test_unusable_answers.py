"""Each refusal has a hint that fits it."""

from __future__ import annotations

import pytest

from gpumesh.audit.catalog import CATALOG
from gpumesh.backends import unusable_answers

PAGE = b"<html><title>502 Bad Gateway</title></html>"


@pytest.mark.parametrize(
    ("status", "body", "said", "hint"),
    [
        (429, b"slow down", "slow down", "limit of requests"),
        (500, b'{"error":"oops"}', "oops", "log on its host"),
        (503, b'{"error":{"message":"Loading model"}}', "Loading model", "wait until"),
        (503, b'{"error":"server busy"}', "server busy", "log on its host"),
        (529, b"overloaded", "overloaded", "limit of requests"),
        (502, b"", "HTTP 502", "a proxy answers"),
        (522, b"", "HTTP 522", "a proxy answers"),
        (500, PAGE, '"502 Bad Gateway"', "a proxy answers"),
    ],
)
def test_not_now(status: int, body: bytes, said: str, hint: str) -> None:
    error = unusable_answers.unavailable_error(status, body)
    assert error.finding_code == "backend-down"
    assert said in error.message
    assert hint in (error.hint or "")


def test_refused() -> None:
    assert "api_key_env" in (unusable_answers.key_refused_error(401, b"no").hint or "")
    assert "a proxy stands before it" in (unusable_answers.key_refused_error(403, PAGE).hint or "")
    assert unusable_answers.key_refused_error(401, b"no").finding_code == "key-refused"


@pytest.mark.parametrize("body", [b'{"models":[', b'  {"a"', b"{", b'{"a":1}}'])
def test_half_json(body: bytes) -> None:
    error = unusable_answers.broken_json_error(body, "/api/tags")
    assert error is not None
    assert (error.finding_code, error.message.isprintable()) == ("answer-broken", True)


@pytest.mark.parametrize("body", [b"", b"hello", b"[1,", b'{"a":1}', b"<html>"])
def test_what_is_no_half_json(body: bytes) -> None:
    assert unusable_answers.broken_json_error(body, "/api/tags") is None


def test_too_many() -> None:
    assert unusable_answers.long_list_error(None) is None
    assert unusable_answers.long_list_error([{}] * unusable_answers.MAX_MODELS) is None
    error = unusable_answers.long_list_error([{}] * (unusable_answers.MAX_MODELS + 1))
    assert error is not None
    assert error.finding_code in CATALOG
    assert str(unusable_answers.MAX_MODELS + 1) in error.message


def test_a_list_that_costs_too_much_to_read_is_told_as_too_long() -> None:
    body = b'{"models":[' + b",".join([b"{}"] * 400_000) + b"]}"
    error = unusable_answers.broken_json_error(body, "/api/tags")
    assert error is not None
    assert error.finding_code == "models-too-many"
