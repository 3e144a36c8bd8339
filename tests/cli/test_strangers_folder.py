"""The command in a folder of somebody else's, whose mesh.yaml would run a program."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.real.command import GPUMESH, Gpumesh

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away"),
]

STRANGER = 54321
COMMANDS = (
    ["status"],
    ["status", "--json"],
    ["up", "-d"],
    ["up"],
    ["run", "hello"],
    ["audit"],
    ["bench", "run"],
    ["models"],
    ["exec", "a", "--", "true"],
    ["config", "show"],
    ["config", "check"],
    ["trust", "a"],
    ["env"],
)


@pytest.fixture
async def folder(gpumesh: Gpumesh, tmp_path: Path) -> Path:
    """Its mesh.yaml leaves a trace when it is used: a file."""
    place = tmp_path / "place"
    place.mkdir()
    trace = {
        "name": "a",
        "ssh": {"user": "root"},
        "address_from": {"command": ["touch", str(tmp_path / "ran")]},
        "backend": {"port": 11434},
    }
    (place / "mesh.yaml").write_text(json.dumps({"nodes": [trace]}))
    return place


async def run(gpumesh: Gpumesh, folder: Path, *arguments: str, **variables: str) -> tuple[int | None, str]:
    environment = gpumesh.environment(**variables)
    del environment["GPUMESH_CONFIG"]
    process = await asyncio.create_subprocess_exec(
        str(GPUMESH),
        *arguments,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert b"Traceback" not in err, err
    return process.returncode, (out + err).decode()


async def test_no_command_does_what_a_strangers_file_says(gpumesh: Gpumesh, folder: Path, tmp_path: Path) -> None:
    os.chown(folder / "mesh.yaml", STRANGER, STRANGER)
    for arguments in COMMANDS:
        code, said = await run(gpumesh, folder, *arguments)
        assert code == 2, (arguments, said)
        assert f"belongs to another user (uid {STRANGER})" in said
        assert "--config ./mesh.yaml" in said
    assert not (tmp_path / "ran").exists()


async def test_completion_does_nothing_and_says_nothing(gpumesh: Gpumesh, folder: Path, tmp_path: Path) -> None:
    os.chown(folder / "mesh.yaml", STRANGER, STRANGER)
    asked = {"_GPUMESH_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    for words in ("gpumesh drain ", "gpumesh exec ", "gpumesh up "):
        assert (await run(gpumesh, folder, COMP_WORDS=words, **asked))[1].split() == [], words
    os.chown(folder / "mesh.yaml", 0, 0)
    assert (await run(gpumesh, folder, COMP_WORDS="gpumesh drain ", **asked))[1].split() == ["a"]
    assert not (tmp_path / "ran").exists(), "not even of one's own file"


async def test_named_it_is_used(gpumesh: Gpumesh, folder: Path, tmp_path: Path) -> None:
    os.chown(folder / "mesh.yaml", STRANGER, STRANGER)
    code, said = await run(gpumesh, folder, "--config", "./mesh.yaml", "status")
    assert code == 0, said
    assert (tmp_path / "ran").exists()
