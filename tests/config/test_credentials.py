from __future__ import annotations

import pytest

from gpumesh import config
from gpumesh.config import credentials
from gpumesh.errors import SecretMissing


def test_a_secret_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_PASSWORD", "hunter2")
    assert config.read_secret("GPU_PASSWORD") == "hunter2"


def test_a_variable_that_is_not_set_or_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPU_PASSWORD", raising=False)
    with pytest.raises(SecretMissing, match="GPU_PASSWORD is not set") as caught:
        config.read_secret("GPU_PASSWORD", node="iceland")
    assert caught.value.node == "iceland"
    monkeypatch.setenv("GPU_PASSWORD", "")
    with pytest.raises(SecretMissing, match="GPU_PASSWORD is empty"):
        config.read_secret("GPU_PASSWORD")


@pytest.mark.parametrize(
    "name", ["API_KEY", "RUNPOD_API_KEY", "APIKEY", "PGPASSWORD", "DB_PASS", "X_TOKEN", "AWS_SECRET"]
)
def test_names_that_say_secret(name: str) -> None:
    assert credentials.names_secret(name)


@pytest.mark.parametrize("name", ["HOST", "SSH_KEY", "KEYBOARD", "PASSENGER", "TOKENIZER", "COMPASS", "PORT"])
def test_names_that_do_not(name: str) -> None:
    assert not credentials.names_secret(name)


def test_what_a_secret_variable_holds_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_TOKEN", "s3cret-s3cret")
    monkeypatch.setenv("Y_TOKEN", "ab")
    assert credentials.mask_secrets("curl -H s3cret-s3cret ab") == "curl -H ******** ab"
