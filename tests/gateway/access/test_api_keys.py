from __future__ import annotations

import hashlib

import pytest

from gpumesh.errors import SecretMissing, UsageError
from gpumesh.gateway.access.api_keys import read_api_keys
from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.text.model_names import full_name
from gpumesh.topology import GatewaySpec, KeySpec, Priority

SECRETS = {"OWN": "one", "CHAT": "two", "SAME": "two"}


def read_secret(variable: str) -> str:
    if variable not in SECRETS:
        raise SecretMissing("not set")
    return SECRETS[variable]


def keys(*specs: KeySpec, own: str | None = None) -> object:
    return read_api_keys(GatewaySpec(api_key_env=own, keys=specs), read_secret=read_secret, identity=full_name)


def test_no_key_is_needed_without_keys() -> None:
    assert keys() is None


def test_each_key_is_its_holders() -> None:
    night = KeySpec("night", sha256=hashlib.sha256(b"three").hexdigest(), nodes=("a",), models=("M",))
    chat = KeySpec("chat", env="CHAT", priority=Priority.BATCH)
    spec = GatewaySpec(api_key_env="OWN", keys=(chat, night))
    all_keys = read_api_keys(spec, read_secret=read_secret, identity=full_name)
    assert all_keys is not None
    assert all_keys.names == {"chat", "night"}
    assert all_keys.find({"authorization": "Bearer one"}) == ClientKey("OWN")
    assert all_keys.find({"x-api-key": "two"}) == ClientKey("chat", "chat", Priority.BATCH)
    found = all_keys.find({"x-api-key": "three", "authorization": "Bearer another service's"})
    assert found == ClientKey("night", "night", None, frozenset({"a"}), frozenset({"m:latest"}))
    assert all_keys.find({"x-api-key": "three", "authorization": "Bearer two"}) == all_keys.find({"x-api-key": "two"})
    for wrong in ({}, {"x-api-key": ""}, {"x-api-key": "four"}, {"authorization": f"Bearer {night.sha256}"}):
        assert all_keys.find(wrong) is None
    assert not any(secret in repr(all_keys) for secret in ("one", "two", "three"))


@pytest.mark.parametrize(
    ("specs", "own", "error"),
    [
        ((KeySpec("a", env="CHAT"), KeySpec("b", env="SAME")), None, UsageError),
        ((KeySpec("a", sha256=hashlib.sha256(b"one").hexdigest()),), "OWN", UsageError),
        ((KeySpec("a", env="NOT_SET"),), None, SecretMissing),
    ],
)
def test_keys_that_cannot_be_used(specs: tuple[KeySpec, ...], own: str | None, error: type[Exception]) -> None:
    with pytest.raises(error):
        keys(*specs, own=own)


def test_what_a_limited_key_may_use() -> None:
    key = ClientKey("k", "k", nodes=frozenset({"a"}), models=frozenset({"m:latest"}))
    key.require_node(None)
    key.require_node("a")
    key.require_model("m", "m:latest")
    with pytest.raises(BadRequest, match="may not use node 'b'; it may use: a"):
        key.require_node("b")
    with pytest.raises(BadRequest, match="may not use model 'n'; it may use: m:latest"):
        key.require_model("n", "n:latest")
    with pytest.raises(BadRequest, match="may not change the mesh") as caught:
        key.require_all()
    assert caught.value.status == 403
    ClientKey("own").require_all()
    ClientKey("own").require_node("b")
