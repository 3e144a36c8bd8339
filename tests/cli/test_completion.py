"""What the shell completes, asked as bash asks: by running the command with its variables."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from gpumesh.lab.profile import QWEN_7B
from tests.cli.meshes import SimulatedMesh, background_mesh, quick_host
from tests.real.command import GPUMESH, Gpumesh
from tests.real.warm_commands import warm_commands

pytestmark = [pytest.mark.slow]


async def completed(gpumesh: Gpumesh, words: str, **environment: str) -> list[str]:
    """The proposals for the last word."""
    variables = gpumesh.environment(
        _GPUMESH_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1), **environment
    )
    async with asyncio.timeout(30):
        _, out, errors = await warm_commands().run((str(GPUMESH),), env=variables, cwd=gpumesh.home, stdin=None)
    assert errors == b"", errors
    return out.decode().split()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SimulatedMesh]:
    models = (QWEN_7B, replace(QWEN_7B, name="qwen2.5:14b"))
    hosts = (quick_host("alpha", ssh=False, models=models), quick_host("beta", ssh=False))
    async with background_mesh(tmp_path_factory.mktemp("mesh"), *hosts) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def two_tags(shared_mesh: SimulatedMesh) -> SimulatedMesh:
    """A running mesh with two models of one family."""
    await shared_mesh.wait_all_up()
    return shared_mesh


async def test_names_of_nodes_and_models(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    assert await completed(gpumesh, "gpumesh drain ") == ["alpha", "beta"]
    assert await completed(gpumesh, "gpumesh drain b") == ["beta"]
    assert await completed(gpumesh, "gpumesh drain x") == []
    assert await completed(gpumesh, "gpumesh status --node a") == ["alpha"]
    assert await completed(gpumesh, "gpumesh exec be") == ["beta"]
    assert await completed(gpumesh, "gpumesh run -m q") == [], "no mesh is running, and none is started for this"
    assert await completed(gpumesh, "gpumesh batch show ") == []
    batch = (await gpumesh("batch", "submit", "-", stdin="Why?\n")).out.strip()
    assert await completed(gpumesh, "gpumesh batch show ") == [batch]
    assert await completed(gpumesh, "gpumesh batch rm batch_") == [batch]
    assert await completed(gpumesh, "gpumesh batch rm x") == []
    await gpumesh("up", "-d")
    assert await completed(gpumesh, "gpumesh run -m q") == ["qwen2.5:7b"]
    assert await completed(gpumesh, "gpumesh models load ") == ["qwen2.5:7b"]
    assert await completed(gpumesh, "gpumesh models sync --from ") == ["alpha", "beta"]
    await gpumesh("down")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("words", "proposals"),
    [
        (["run", "-m", "qw"], ["qwen2.5:7b", "qwen2.5:14b"]),
        (["run", "-m", "qwen2.5", ":"], ["7b", "14b"]),
        (["run", "-m", "qwen2.5", ":", "1"], ["14b"]),
        (["models", "rm", "qwen2.5", ":", "7b", "qwen2.5", ":", "14"], ["14b"]),
        (["models", "rm", "qwen2.5", ":", "7b", "--node", "al"], ["alpha"]),
        (["run", "-m", "none", ":", "1"], []),
        (["drain", ""], ["alpha", "beta"]),
    ],
)
async def test_bash_breaks_words_at_colons(two_tags: SimulatedMesh, words: list[str], proposals: list[str]) -> None:
    """As bash itself has it: the function that was installed, and ``COMP_WORDS`` broken at each colon."""
    script = """
        eval "$(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1 "$1" --show-completion bash)"
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        _gpumesh_completion "$1"
        ((${#COMPREPLY[@]})) && printf '%s\\n' "${COMPREPLY[@]}"
        exit 0
    """
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", script, "bash", str(GPUMESH), *words,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=two_tags.gpumesh.environment(), cwd=two_tags.gpumesh.home,
    )  # fmt: skip
    async with asyncio.timeout(30):
        out, errors = await process.communicate()
    assert errors == b"", errors
    assert sorted(out.decode().split()) == sorted(proposals)


async def test_commands_and_options(gpumesh: Gpumesh) -> None:
    assert set(await completed(gpumesh, "gpumesh st")) == {"status"}
    assert {"pull", "rm", "load", "unload", "list", "sync"} <= set(await completed(gpumesh, "gpumesh models "))
    assert "--watch" in await completed(gpumesh, "gpumesh status --")
    assert await completed(gpumesh, "gpumesh run --priority ") == ["interactive", "normal", "batch"]
    assert await completed(gpumesh, "gpumesh bench run --scenario s") == ["sweep", "scale"]


async def test_a_named_file_is_read(direct: SimulatedMesh) -> None:
    other = direct.gpumesh.home / "other.yaml"
    direct.gpumesh.config.rename(other)
    assert await completed(direct.gpumesh, "gpumesh -c other.yaml drain ") == ["alpha", "beta"]
    assert await completed(direct.gpumesh, "gpumesh drain -c other.yaml ") == ["alpha", "beta"]


@pytest.mark.parametrize("text", [None, "", "nodes: [", "nodes: 5", "nodes: [{name: a}]"])
async def test_nothing_to_complete_is_no_error(gpumesh: Gpumesh, text: str | None) -> None:
    if text is not None:
        gpumesh.config.write_text(text)
    assert await completed(gpumesh, "gpumesh drain ") == []
    assert await completed(gpumesh, "gpumesh run -m ") == []


async def test_nothing_that_mesh_yaml_names_is_run(direct: SimulatedMesh) -> None:
    """Not even ssh, which is asked for an alias elsewhere: a ``Match exec`` of ~/.ssh/config may run anything."""
    gpumesh = direct.gpumesh
    ran = gpumesh.home / "ran"
    programs = gpumesh.home / "bin"
    programs.mkdir()
    for name in ("ssh", "look-up"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {ran}\nsleep 60\n")
        (programs / name).chmod(0o755)
    look_up = {"name": "pod", "ssh": {"user": "root"}, "address_from": {"command": [str(programs / "look-up")]}}
    direct.write([{"name": "work", "ssh": {"alias": "work"}}, look_up])
    assert await completed(gpumesh, "gpumesh drain ", PATH=f"{programs}:{os.environ['PATH']}") == ["work", "pod"]
    assert not ran.exists()


async def test_a_mesh_that_hangs_does_not_hang_the_shell(direct: SimulatedMesh) -> None:
    await direct.gpumesh("up", "-d")
    (pid,) = direct.gpumesh.processes()
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(10):
            assert await completed(direct.gpumesh, "gpumesh run -m ") == []
    finally:
        os.kill(pid, signal.SIGCONT)
    await direct.gpumesh("down")
