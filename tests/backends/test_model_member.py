from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.model_member import replace_model


def replaced(body: bytes, name: str) -> bytes:
    parts = replace_model(body, name)
    return body if parts is None else b"".join(parts)


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
    assert parts[0] + bytes(parts[1]) == head + b"whisper" + rest
    assert replace_model(head + b"whisper" + rest, "whisper") is None
