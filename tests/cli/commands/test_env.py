from __future__ import annotations

import subprocess

import pytest

from gpumesh.cli.commands.env import ShellKind, client_variables, export_lines
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
