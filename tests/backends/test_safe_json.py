from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends import safe_json

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("data", [b"", b"{", b"nonsense", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 5000, b"null"])
def test_what_is_no_document_is_none(data: bytes) -> None:
    assert safe_json.parse(data) is None
    assert safe_json.parse_object(data) is None


def test_an_object_is_an_object() -> None:
    assert safe_json.parse_object(b'{"a":1}') == {"a": 1}
    assert safe_json.parse_object(b"[1]") is None
    assert safe_json.parse(b"[1]") == [1]


@pytest.mark.parametrize(
    ("value", "whole"),
    [(0, 0), (5, 5), (5.9, 5), (-1, None), (True, None), ("5", None), (None, None), (1 << 70, None), ([], None)],
)
def test_whole(value: Any, whole: int | None) -> None:
    assert safe_json.as_count(value) == whole


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300, True, "1", None, -0.1])
def test_what_is_no_number(value: Any) -> None:
    assert safe_json.as_number(value) is None
    assert safe_json.as_count(value) is None or value == 1e300
    assert safe_json.as_mib(value) is None


def test_mib_is_rounded() -> None:
    assert (safe_json.as_mib(5_368_709_120), safe_json.as_mib(1_500_000), safe_json.as_mib(0)) == (5120, 1, 0)


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-11-24T04:10:00.123456789Z", datetime(2026, 11, 24, 4, 10, 0, 123456, UTC)),
        ("2026-11-24T04:10:00.1+02:00", datetime(2026, 11, 24, 2, 10, 0, 100000, UTC)),
        ("2026-11-24T04:10:00", datetime(2026, 11, 24, 4, 10, tzinfo=UTC)),
        ("2318-03-01T00:00:00.000000001-07:00", datetime(2318, 3, 1, 7, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", None),
        ("9999-12-31T23:59:59-23:00", None),
        ("yesterday", None),
        ("", None),
        ("2" * 100, None),
        (5, None),
        (None, None),
    ],
)
def test_instants_as_go_writes_them(text: Any, instant: datetime | None) -> None:
    assert safe_json.as_datetime(text) == instant


def test_objects_of_a_list() -> None:
    assert safe_json.as_objects([{"a": 1}, 5, None, {"b": 2}]) == ({"a": 1}, {"b": 2})
    assert safe_json.as_objects({"a": 1}) == ()
    assert len(safe_json.as_objects([{}] * 20_000)) == 10_000


def test_compact_keeps_letters_and_lone_surrogates() -> None:
    assert safe_json.dump_compact({"a": "é日"}) == '{"a":"é日"}'.encode()
    assert json.loads(safe_json.dump_compact({"a": "\ud800"})) == {"a": "\ud800"}


@given(ANYTHING)
def test_no_value_raises(value: Any) -> None:
    for read in (
        safe_json.as_text,
        safe_json.as_count,
        safe_json.as_number,
        safe_json.as_mib,
        safe_json.as_objects,
        safe_json.as_datetime,
    ):
        read(value)


@given(st.binary(max_size=200))
def test_no_bytes_raise(data: bytes) -> None:
    safe_json.parse(data)
    assert safe_json.parse_object(data) is None or isinstance(safe_json.parse_object(data), dict)


@given(st.text(max_size=40))
def test_no_text_raises_as_an_instant(text: str) -> None:
    found = safe_json.as_datetime(text)
    assert found is None or found.tzinfo is UTC


def test_a_document_of_far_more_values_than_an_answer_has_is_not_taken_apart() -> None:
    for value in (b"[]", b'{"a":1}', b"1"):
        document = b"[" + b",".join([value] * (safe_json.ANSWER_VALUES + 1)) + b"]"
        assert safe_json.parse(document) is None
    context = b'{"done":true,"context":[' + b",".join([b"128000"] * 262_144) + b"]}"
    assert safe_json.parse(context) is not None, "the final line of /api/generate, for the largest context there is"
    assert safe_json.parse(b'"' + b"a" * (8 << 20) + b'"') is not None
    assert safe_json.parse(b'"' + b"a" * safe_json.ANSWER_BYTES + b'"') is None


def test_what_is_not_taken_apart_has_no_cost() -> None:
    for document in (b"[" + b",".join([b"1"] * (safe_json.ANSWER_VALUES + 1)) + b"]", b'"' + b"a" * (16 << 20) + b'"'):
        assert safe_json.estimate_memory(document, 1 << 30) is None
    assert safe_json.estimate_memory(b"[" + b",".join([b"1"] * 290_000) + b"]", 1 << 30) is not None


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1" * 5000, "-" + "1" * 30, "1e999"])
def test_a_number_that_is_none_costs_a_report_no_more_than_itself(number: str) -> None:
    document = safe_json.parse_report(b'{"size":%b,"name":"m"}' % number.encode())
    assert document is not None
    assert document["name"] == "m"
    assert safe_json.as_count(document["size"]) is None


def test_a_report_is_an_object_in_utf_8() -> None:
    assert safe_json.parse_report(b"\xef\xbb\xbf{}") == {}
    assert safe_json.parse_report(b'{"a":"\xff"}') == {"a": "\ufffd"}
    assert safe_json.parse_report(b"[]") is None
    assert safe_json.parse_report(b"[" * 200_000) is None
    assert safe_json.parse_report(b'{"a":' * 100_000) is None


def test_a_document_of_too_many_values_is_not_read() -> None:
    """8 MiB of ``[],`` take half a second, and a hundred times their size."""
    lists = b'{"models":[' + b"[]," * safe_json.REPORT_VALUES + b"[]]}"
    assert safe_json.parse_report(lists) is None
    assert safe_json.parse_report(b'{"models":[[]]}', 2) is None
    assert safe_json.parse_report(b'{"models":[[]]}', 3) == {"models": [[]]}
    numbers = b'{"models":[' + b"1," * safe_json.REPORT_VALUES + b"1]}"
    assert safe_json.parse_report(numbers) is None
    assert safe_json.parse_object(numbers) is not None, "as an answer it is not too large"


@pytest.mark.parametrize("value", [-1, 11, 10**400, math.inf, math.nan, "5", True, None])
def test_up_to(value: Any) -> None:
    assert safe_json.as_bounded_count(value, 10) is None
    assert safe_json.as_bounded_count(10, 10) == 10
