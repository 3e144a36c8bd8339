from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.body_pieces import Piece
from gpumesh.backends.json_scanner import WINDOW
from gpumesh.backends.model_member import replace_model, scan_model


def replaced(body: bytes, name: str) -> bytes:
    """The new body. It is the same, whether the old one is read at once or in steps."""
    parts = replace_model(body, name)
    new_body = body if parts is None else b"".join(parts)
    scanned, _ = scan(body, name)
    scanned_body = body if scanned is None else b"".join(scanned)
    assert scanned_body == new_body or json.loads(scanned_body) == json.loads(new_body)
    return new_body


def scan(body: bytes, name: str) -> tuple[list[Piece] | None, int]:
    """The pieces of ``scan_model``, and the number of its steps."""
    work, steps = scan_model(body, name), 0
    while True:
        try:
            next(work)
            steps += 1
        except StopIteration as stop:
            return stop.value, steps


def test_a_long_body_is_read_in_short_steps() -> None:
    body = b'{"messages":[' + b",".join([b'{"role":"user","content":"a"}'] * 40_000) + b'],"model":"a"}'
    pieces, steps = scan(body, "b")
    assert pieces is not None
    assert b"".join(pieces) == b'{"model":"b",' + body[1:].removesuffix(b',"model":"a"}') + b"}"
    assert steps >= len(body) / WINDOW, "in no step more than a window is read"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","prompt":"hi"}',
        b' {\n "model" : "a" , "prompt":"hi"}',
        b'{"prompt":"hi","model":"a"}',
        b'{"prompt":"\\"model\\":\\"a\\"","model":"a"}',
        b'{"model":"a\\"b\\\\"}',
        b'{"options":{"model":"x"},"model":null}',
    ],
)
def test_only_the_model_is_another(body: bytes) -> None:
    expected = json.loads(body) | {"model": 'n"ew'}
    assert json.loads(replaced(body, 'n"ew')) == expected


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"nonsense", b'{"prompt":"hi"}', b'{"model":"n"}', b'{"prompt":"hi","model":"\\u006e"}']
)
def test_what_is_sent_as_it_is(body: bytes) -> None:
    assert replace_model(body, "n") is None
    assert scan(body, "n")[0] is None


@given(
    st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=10)),
    st.text(min_size=1),
    st.text(),
    st.booleans(),
)
def test_any_body(others: dict[str, Any], name: str, old_name: str, is_first: bool) -> None:
    others.pop("model", None)
    members = {"model": old_name, **others} if is_first else {**others, "model": old_name}
    assert json.loads(replaced(json.dumps(members).encode(), name)) == {**others, "model": name}


def test_a_form_gets_the_name_in_its_first_part() -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
    rest = b'\r\n--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\x00\r\n--b--\r\n'
    parts = replace_model(head + b"m" + rest, "whisper")
    assert parts is not None
    assert b"".join(parts) == head + b"whisper" + rest
    assert replace_model(head + b"whisper" + rest, "whisper") is None
