from __future__ import annotations

import pytest

from gpumesh.gateway.access.client_names import MAX_NAME_CHARS, ClientNames
from gpumesh.gateway.http.client_key import ClientKey

NAMES = ClientNames({"chat"})
HEADER = {"x-gpumesh-client": "app"}
BEARER = {"authorization": "Bearer s3cret"}


@pytest.mark.parametrize(
    ("key", "headers", "name"),
    [
        (ClientKey("chat", "chat"), HEADER, "chat"),
        (ClientKey("OWN_KEY"), HEADER, "app"),
        (None, HEADER | BEARER, "app"),
        (None, {}, "10.0.0.1"),
        (None, {"x-gpumesh-client": "chat"}, "10.0.0.1"),
        (None, {"x-gpumesh-client": " \x1b[31m\u202e "}, "10.0.0.1"),
        (None, {"x-gpumesh-client": "\x1b[31mred\x07 app "}, "red app"),
    ],
)
def test_the_name_of_a_client(key: ClientKey | None, headers: dict[str, str], name: str) -> None:
    assert NAMES.name_client(key, headers, "10.0.0.1") == name


def test_a_name_is_short() -> None:
    assert len(NAMES.name_client(None, {"x-gpumesh-client": "x" * 5000}, None)) == MAX_NAME_CHARS


def test_nobody_is_known_by_nothing() -> None:
    assert NAMES.name_client(None, {}, None) == ""


def test_a_credential_is_known_by_a_hash_that_tells_nothing() -> None:
    name = NAMES.name_client(None, BEARER, "10.0.0.1")
    assert name.startswith("credential-")
    assert "s3cret" not in name
    assert NAMES.name_client(None, BEARER, "10.0.0.1") == name
    assert NAMES.name_client(ClientKey("OWN_KEY"), BEARER, "10.0.0.1") == name
    assert NAMES.name_client(None, BEARER, "10.0.0.2") != name, "many clients send the same word as their key"
    assert NAMES.name_client(None, {"x-api-key": "other"}, "10.0.0.1") != name
    assert ClientNames().name_client(None, BEARER, "10.0.0.1") != name, "the next process has another secret"
    assert NAMES.name_client(None, {"x-api-key": "\udcff"}, None).startswith("credential-")
