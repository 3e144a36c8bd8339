from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from gpumesh.config.credentials import read_secret_file
from gpumesh.errors import SecretMissing, UsageError
from gpumesh.gateway.access.api_keys import ApiKeys, find_key_by_name, read_api_keys
from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.text.model_names import full_name
from gpumesh.topology import GatewaySpec, KeySpec, Priority, RequestRate

SECRETS = {"OWN": "one", "CHAT": "two", "SAME": "two"}


def read_secret(variable: str) -> str:
    if variable not in SECRETS:
        raise SecretMissing("not set")
    return SECRETS[variable]


def read_keys(spec: GatewaySpec) -> ApiKeys | None:
    return read_api_keys(spec, read_secret=read_secret, read_secret_file=read_secret_file, identity=full_name)


def keys(*specs: KeySpec, own: str | None = None) -> object:
    return read_keys(GatewaySpec(api_key_env=own, keys=specs))


def test_no_key_is_needed_without_keys() -> None:
    assert keys() is None


def test_each_key_is_its_holders() -> None:
    night = KeySpec("night", sha256=hashlib.sha256(b"three").hexdigest(), nodes=("a",), models=("M",))
    chat = KeySpec("chat", env="CHAT", priority=Priority.BATCH)
    spec = GatewaySpec(api_key_env="OWN", keys=(chat, night))
    all_keys = read_keys(spec)
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


def test_a_key_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("  four\n")
    found = read_keys(GatewaySpec(keys=(KeySpec("app", file=file, rate=RequestRate(2, 1.0), tokens_per_month=9),)))
    assert found is not None
    key = found.find({"authorization": "Bearer four"})
    assert key == ClientKey("app", "app", rate=RequestRate(2, 1.0), tokens_per_month=9)
    assert key.has_quota
    assert not ClientKey("app", "app").has_quota
    assert (key.usage_name, ClientKey("OWN").usage_name) == ("app", "$OWN")


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        (b"", 0o600, "is empty"),
        (b"a\nb\n", 0o600, "holds more than one line"),
        (b"\xff", 0o600, "holds no text"),
        (b"k" * 5000, 0o600, "is too large"),
        (b"sk-hunter2", 0o622, "may be written to by other users"),
        (None, 0, "cannot be read: No such file"),
    ],
)
def test_a_file_that_holds_no_usable_key(tmp_path: Path, content: bytes | None, mode: int, problem: str) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    with pytest.raises(SecretMissing, match=problem) as caught:
        keys(KeySpec("app", file=file))
    assert str(file) in caught.value.message
    assert "hunter2" not in caught.value.message


def test_a_pipe_in_the_place_of_a_key_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key")
    with pytest.raises(SecretMissing, match="not a regular file"):
        read_secret_file(tmp_path / "key")


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


def test_a_key_is_found_by_the_name_under_which_its_usage_counts() -> None:
    spec = GatewaySpec(api_key_env="ALL", keys=(KeySpec("ann", sha256="0" * 64, models=("A",), tokens_per_month=5),))
    assert find_key_by_name(spec, "$ALL", str.lower) == ClientKey(label="ALL")
    assert find_key_by_name(spec, "ann", str.lower) == ClientKey("ann", "ann", None, None, frozenset("a"), None, 5)
    for name in ("ALL", "$OTHER", "bob", "", "(run)", "(no key)"):
        assert find_key_by_name(spec, name, str.lower) is None
