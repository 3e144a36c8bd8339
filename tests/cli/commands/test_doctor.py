from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gpumesh.daemon.paths import for_config
from tests.cli.in_process import invoke

SECRETS = {"GPUMESH_API_KEY": "sk-of-the-gateway", "ICELAND_WORD": "hunter2-of-iceland", "DB_PASSWORD": "of-something"}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mesh.yaml that names secrets, and a log that should not have them and has them all the same."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    path = tmp_path / "mesh.yaml"
    for name, value in (("HOME", tmp_path), ("XDG_RUNTIME_DIR", runtime), ("GPUMESH_CONFIG", path), *SECRETS.items()):
        monkeypatch.setenv(name, str(value))
    ssh = {"host": "203.0.113.7", "user": "root", "password_env": "ICELAND_WORD"}
    node = {"name": "iceland", "ssh": ssh, "backend": {"port": 80}}
    path.write_text(json.dumps({"gateway": {"api_key_env": "GPUMESH_API_KEY"}, "nodes": [node]}))
    log = for_config(path).log
    log.parent.mkdir(parents=True)
    message = f"refused \x1b[31m {' '.join(SECRETS.values())}"
    entry = {"at": datetime.now(UTC).isoformat(), "level": "warning", "node": "iceland", "message": message}
    log.write_text(json.dumps({**entry, "level": "info", "message": "usual"}) + "\n" + json.dumps(entry) + "\n")
    return path


@pytest.mark.parametrize("words", [(), ("-o", "json"), ("-o", "yaml"), ("--json",)])
def test_no_secret_is_in_it(config: Path, words: tuple[str, ...]) -> None:
    ended = invoke("doctor", *words)
    for secret in SECRETS.values():
        assert secret not in ended.out + ended.err
    assert "ICELAND_WORD is set" in ended.out
    assert "\x1b" not in ended.out
    assert "usual" not in ended.out, "only warnings and errors of the log"
    assert str(config.parent) not in ended.out, "the home folder is ~"


def test_what_it_tells(config: Path) -> None:
    report = json.loads(invoke("doctor", "--json").out)
    assert report["schema"] == "gpumesh.doctor/1"
    assert report["configuration"]["valid"] == "yes"
    assert report["configuration"]["file"] == "~/mesh.yaml"
    assert report["mesh"] == {"state": "does not run", "other_meshes": []}
    assert "refused" in report["log"]["last_warnings"][0]
    assert report["libraries"]["paramiko"]
    assert " of " in report["limits"]["open_files"]


def test_a_broken_configuration_and_none(config: Path) -> None:
    config.write_text("nodes: [{nam: x}]")
    report = json.loads(invoke("doctor", "--json").out)
    assert report["configuration"]["valid"] == "no"
    assert any("nam" in problem for problem in report["configuration"]["problems"])
    config.unlink()
    ended = invoke("doctor")
    assert "does not exist" in ended.out
    assert "names and addresses" in ended.err
    assert invoke("doctor", "--quiet").err == ""


def test_a_redis_that_does_not_answer(config: Path) -> None:
    mesh = json.loads(config.read_text())
    assert "redis" not in json.loads(invoke("doctor", "--json").out)
    redis = {"url": "redis://me@127.0.0.1:1/0", "password_env": "DB_PASSWORD"}
    config.write_text(json.dumps({**mesh, "name": "home", "redis": redis}))
    ended = invoke("doctor", "--json")
    section = json.loads(ended.out)["redis"]
    assert section["url"] == redis["url"]
    assert "127.0.0.1:1" in section["error"]
    assert SECRETS["DB_PASSWORD"] not in ended.out
