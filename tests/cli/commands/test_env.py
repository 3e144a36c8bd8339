from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpumesh.cli.commands.env import (
    KEY_VARIABLES,
    PLACEHOLDER_KEY,
    ShellKind,
    client_variables,
    copy_lines,
    export_lines,
    missing_keys,
)
from gpumesh.cli.root_command import app
from tests.cli.meshes import SimulatedMesh

URL = "http://127.0.0.1:11430"
ODD = {"A": "it's $HOME `x`"}


def test_the_names_that_clients_look_for() -> None:
    assert client_variables(URL) == {"OLLAMA_HOST": URL, "OPENAI_BASE_URL": f"{URL}/v1", "ANTHROPIC_BASE_URL": URL}


def test_a_shell_takes_them_as_they_are() -> None:
    script = f'{export_lines(client_variables(URL) | ODD, ShellKind.SH)}\nprintf \'%s|\' "$OLLAMA_HOST" "$A"'
    out = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert out == f"{URL}|{ODD['A']}|"


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        (ShellKind.SH, f"export OLLAMA_HOST={URL}"),
        (ShellKind.BASH, f"export OLLAMA_HOST={URL}"),
        (ShellKind.ZSH, f"export OLLAMA_HOST={URL}"),
        (ShellKind.FISH, f"set -gx OLLAMA_HOST {URL};"),
        (ShellKind.POWERSHELL, f"$Env:OLLAMA_HOST = '{URL}'"),
    ],
)
def test_each_shell_has_its_own_words(shell: ShellKind, line: str) -> None:
    assert export_lines(client_variables(URL), shell).splitlines()[0] == line


def test_quotes_in_powershell_are_doubled() -> None:
    assert export_lines(ODD, ShellKind.POWERSHELL) == "$Env:A = 'it''s $HOME `x`'"


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        ((), {"OPENAI_API_KEY", "ANTHROPIC_API_KEY"}),
        (("OPENAI_API_KEY",), {"ANTHROPIC_API_KEY"}),
        (("ANTHROPIC_AUTH_TOKEN",), {"OPENAI_API_KEY"}),
        (("OPENAI_API_KEY", "ANTHROPIC_API_KEY"), set()),
    ],
)
def test_a_key_that_a_package_insists_on_is_made_up_unless_there_is_one(
    present: tuple[str, ...], missing: set[str]
) -> None:
    assert missing_keys(present.__contains__) == dict.fromkeys(missing, PLACEHOLDER_KEY)


def test_the_key_of_the_gateway_is_copied_and_not_printed() -> None:
    script = f"{copy_lines('MESH_KEY', ShellKind.SH)}\nprintf '%s|' " + " ".join(f'"${name}"' for name in KEY_VARIABLES)
    key = 'it\'s $HOME `x` "y"'
    done = subprocess.run(["/bin/sh", "-c", script], env={"MESH_KEY": key}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{key}|" * len(KEY_VARIABLES)
    assert copy_lines("K", ShellKind.FISH).splitlines()[0] == 'set -gx OPENAI_API_KEY "$K";'
    assert copy_lines("K", ShellKind.POWERSHELL).splitlines()[0] == "$Env:OPENAI_API_KEY = $Env:K"


def run_env(monkeypatch: pytest.MonkeyPatch, folder: Path, listen: str, **variables: str) -> tuple[str, str]:
    """What ``gpumesh env`` prints to both outputs, without a running mesh. ``variables`` are all that is set."""
    file = folder / "mesh.yaml"
    gateway = {"listen": "127.0.0.1:11499", **json.loads(listen)}
    file.write_text(json.dumps({"version": 1, "gateway": gateway, "nodes": [{"name": "a", "backend": {"url": URL}}]}))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    for name in (*KEY_VARIABLES, "MESH_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["-c", str(file), "env", "--shell", "sh"])
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_without_a_key_the_packages_get_a_placeholder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, err = run_env(monkeypatch, tmp_path, "{}", OPENAI_API_KEY="sk-mine")
    assert f"export ANTHROPIC_API_KEY={PLACEHOLDER_KEY}" in out.splitlines()
    assert "OPENAI_API_KEY" not in out
    assert "key" not in err


def test_a_key_that_the_gateway_asks_for_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, err = run_env(monkeypatch, tmp_path, '{"api_key_env": "MESH_KEY"}')
    assert "the gateway asks for a key, and no variable of mesh.yaml holds one here: `export MESH_KEY=…`" in err
    assert "API_KEY" not in out
    out, err = run_env(
        monkeypatch, tmp_path, '{"api_key_env": "MESH_KEY"}', MESH_KEY="secret", OPENAI_API_KEY="sk-mine"
    )
    assert out.splitlines()[3:] == [f'export {name}="$MESH_KEY"' for name in KEY_VARIABLES]
    assert "OPENAI_API_KEY, ANTHROPIC_API_KEY, OLLAMA_API_KEY get the one in $MESH_KEY" in err
    assert "secret" not in out + err


def test_a_key_that_only_its_holder_knows_is_told_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = json.dumps({"keys": [{"name": "bob", "hash": "0" * 64}]})
    out, err = run_env(monkeypatch, tmp_path, keys)
    assert "the gateway asks for a key: set OPENAI_API_KEY, ANTHROPIC_API_KEY, OLLAMA_API_KEY to yours" in err
    assert "API_KEY" not in out


@pytest.mark.slow
async def test_of_the_running_mesh_else_of_mesh_yaml(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    ended = await gpumesh("env", code=1)
    assert ended.out == ""
    assert "no mesh is running, and mesh.yaml lets the gateway take any port" in ended.err
    await gpumesh("up", "-d")
    url = (await gpumesh("status", "--json")).json()["gateway"]["url"]
    assert (await gpumesh("env", "--shell", "sh")).out.splitlines()[0] == f"export OLLAMA_HOST={url}"
    assert (await gpumesh("env", "--shell", "fish")).out.startswith("set -gx OLLAMA_HOST ")
    await gpumesh("down")
    direct.write(listen="127.0.0.1:11499")
    ended = await gpumesh("env", "--shell", "sh")
    assert "export OPENAI_BASE_URL=http://127.0.0.1:11499/v1" in ended.out
    assert "no mesh is running" in ended.err
    await gpumesh("up", "-d", "--no-gateway")
    ended = await gpumesh("env", code=1)
    assert "the running mesh has no gateway" in ended.err
    await gpumesh("down")
    assert "'tcsh' is not one of" in (await gpumesh("env", "--shell", "tcsh", code=2)).err
