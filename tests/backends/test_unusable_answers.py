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
        (502, b"", "HTTP 502", "a proxy answers"),
        (500, PAGE, '"502 Bad Gateway"', "a proxy answers"),
    ],
)
def test_not_now(status: int, body: bytes, said: str, hint: str) -> None:
    error = unusable_answers.not_now(status, body)
    assert error.finding == "backend-down"
    assert said in error.message
    assert hint in (error.hint or "")


def test_refused() -> None:
    assert "api_key_env" in (unusable_answers.refused(401, b"no").hint or "")
    assert "a proxy stands before it" in (unusable_answers.refused(403, PAGE).hint or "")
    assert unusable_answers.refused(401, b"no").finding == "key-refused"


@pytest.mark.parametrize("body", [b'{"models":[', b'  {"a"', b"{", b'{"a":1}}'])
def test_half_json(body: bytes) -> None:
    error = unusable_answers.half_json(body, "/api/tags")
    assert error is not None
    assert (error.finding, error.message.isprintable()) == ("answer-broken", True)


@pytest.mark.parametrize("body", [b"", b"hello", b"[1,", b'{"a":1}', b"<html>"])
def test_what_is_no_half_json(body: bytes) -> None:
    assert unusable_answers.half_json(body, "/api/tags") is None


def test_too_many() -> None:
    assert unusable_answers.too_many(None) is None
    assert unusable_answers.too_many([{}] * unusable_answers.MOST_MODELS) is None
    error = unusable_answers.too_many([{}] * (unusable_answers.MOST_MODELS + 1))
    assert error is not None
    assert error.finding in CATALOG
    assert str(unusable_answers.MOST_MODELS + 1) in error.message


def test_a_list_that_costs_too_much_to_read_is_told_as_too_long() -> None:
    body = b'{"models":[' + b",".join([b"{}"] * 400_000) + b"]}"
    error = unusable_answers.half_json(body, "/api/tags")
    assert error is not None
    assert error.finding == "models-too-many"
