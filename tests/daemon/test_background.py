"""The background mesh, as `gpumesh up -d` starts it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from tests.cli.meshes import isolated_command, quick_host, simulated_mesh

GPUMESH = Path(sys.executable).with_name("gpumesh")


@pytest.mark.slow
async def test_the_working_directory_is_not_imported_from(tmp_path: Path) -> None:
    """Without -P, Python imports from the current folder before its own libraries."""
    (tmp_path / "gpumesh").mkdir()
    (tmp_path / "yaml.py").write_text("raise SystemExit('this is not the YAML that was meant')\n")
    environment = {**os.environ, "HOME": str(tmp_path)}

    async def gpumesh(*arguments: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            GPUMESH,
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            cwd=tmp_path,
        )
        async with asyncio.timeout(45):
            out, _ = await process.communicate()
        return process.returncode, out.decode()

    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as runtime:  # short: it holds a Unix socket
        environment["XDG_RUNTIME_DIR"] = runtime
        async with SimOllama(profile.make_instant_host("one")) as server:
            mesh = {"gateway": {"listen": "127.0.0.1:0"}, "nodes": [{"name": "one", "backend": {"url": server.url}}]}
            (tmp_path / "mesh.yaml").write_text(json.dumps(mesh))
            code, out = await gpumesh("up", "-d")
            assert code == 0, out
            try:
                code, out = await gpumesh("run", "Hello")
                assert code == 0, out
            finally:
                code, out = await gpumesh("down")
            assert code == 0, out


@pytest.mark.slow
async def test_a_mesh_without_its_socket_is_stopped_by_a_signal(tmp_path: Path) -> None:
    with isolated_command(tmp_path) as gpumesh:
        async with simulated_mesh(gpumesh, quick_host("alpha", ssh=False)):
            await gpumesh("up", "-d")
            (socket,) = gpumesh.runtime.rglob("control.sock")
            socket.unlink()
            ended = await gpumesh("down")
            assert ended.out + ended.err == "stopped\n"


@pytest.mark.slow
async def test_a_mesh_without_its_mesh_yaml_can_be_shown_and_stopped(tmp_path: Path) -> None:
    with isolated_command(tmp_path) as gpumesh:
        async with simulated_mesh(gpumesh, quick_host("alpha", ssh=False)):
            await gpumesh("up", "-d")
            gpumesh.config.unlink()
            assert (await gpumesh("status", "--json")).json()["gateway"]["state"] == "serving"
            await gpumesh("down")
            ended = await gpumesh("down", code=2)
            assert "does not exist" in ended.err
            assert gpumesh.sockets() == []
