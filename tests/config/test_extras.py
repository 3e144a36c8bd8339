"""A person who lacks the package of an extra gets one sentence and a command, from the installed `gpumesh` itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpumesh.config.extras import PACKAGES, need_extra
from gpumesh.errors import GPUMeshError

MESH = {
    "gateway": {"listen": "127.0.0.1:0"},
    "nodes": [{"name": "one", "backend": {"url": "http://127.0.0.1:1"}}],
    "redis": {"url": "redis://127.0.0.1:1"},
}
# Stands before the packages of the environment, as if neither package were installed there.
WITHOUT_EXTRAS = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {tuple(PACKAGES.values())!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run_without_extras(folder: Path, *arguments: str) -> tuple[int, str]:
    """Runs `gpumesh` in a process in which the packages of all extras are missing. Returns its exit code and stderr."""
    (folder / "mesh.yaml").write_text(json.dumps(MESH))
    program = f"{WITHOUT_EXTRAS}\nfrom gpumesh.cli.main import main\nmain()"
    environment = {**os.environ, "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stderr


def test_the_demo_without_the_lab(tmp_path: Path) -> None:
    code, err = run_without_extras(tmp_path, "demo")
    assert code == 1
    error, hint = err.splitlines()
    assert error == "error: `gpumesh demo` needs the Python package aiohttp, which is not installed"
    assert re.fullmatch(rf"hint: `{re.escape(sys.executable)} -m pip install 'aiohttp[0-9<>=.,]+'`", hint)


def test_a_mesh_with_redis_without_it(tmp_path: Path) -> None:
    code, err = run_without_extras(tmp_path, "status")
    assert code == 1
    error, hint = err.splitlines()
    assert error == "error: `redis:` in mesh.yaml needs the Python package redis, which is not installed"
    assert re.fullmatch(rf"hint: `{re.escape(sys.executable)} -m pip install 'redis[0-9<>=.,]+'`", hint)


def test_everything_else_works_without_extras(tmp_path: Path) -> None:
    for arguments in (["config", "check"], ["bench", "--help"], ["bench", "run", "--help"]):
        code, err = run_without_extras(tmp_path, *arguments)
        assert code == 0, err


@pytest.mark.parametrize(
    ("prefix", "command"),
    [
        ("/home/ada/.local/share/pipx/venvs/gpumesh-cli", "pipx inject gpumesh-cli"),
        ("/home/ada/.local/share/uv/tools/gpumesh-cli", f"uv pip install --python {sys.executable}"),
    ],
)
def test_the_command_of_the_program_that_has_installed_gpumesh(
    monkeypatch: pytest.MonkeyPatch, prefix: str, command: str
) -> None:
    monkeypatch.setattr(sys, "prefix", prefix)
    with pytest.raises(GPUMeshError) as caught, need_extra("redis", "this"):
        raise ModuleNotFoundError(name="redis.asyncio")
    assert re.fullmatch(rf"`{re.escape(command)} 'redis[0-9<>=.,]+'`", str(caught.value.hint))


def test_another_missing_module_is_not_explained_away() -> None:
    with pytest.raises(ModuleNotFoundError), need_extra("redis", "this"):
        raise ModuleNotFoundError(name="redistribution")
