"""One host that answers as an attacker's would, and all that people do with a mesh it is in."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gpumesh import config
from gpumesh.config import environment
from gpumesh.lab.profile import QWEN_7B
from gpumesh.text.printable import printable
from tests.cli.meshes import SimulatedMesh, quick_host, simulated_mesh
from tests.hostile_names import NAMES, check_safe_to_paste
from tests.real.command import CommandResult, Gpumesh

pytestmark = [pytest.mark.slow]

EXPANDED = "${GPUMESH_CONFIG}"
CALLED = "zed$(touch ran)"
GPU = "zed\x1b]0;x\x07 '${GPUMESH_CONFIG}' `touch ran`"


@pytest.fixture
async def hostile(gpumesh: Gpumesh) -> AsyncIterator[SimulatedMesh]:
    models = tuple(replace(QWEN_7B, name=name) for name in (*NAMES, "qwen2.5:7b"))
    host = quick_host("alpha", models=models)
    host = replace(host, hostname=EXPANDED, gpus=tuple(replace(gpu, name=GPU) for gpu in host.gpus))
    async with simulated_mesh(gpumesh, host) as made:
        yield made


def safe(ended: CommandResult, mesh: SimulatedMesh) -> None:
    for text in (ended.out, ended.err):
        assert re.fullmatch(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]*", text), repr(text)
    assert not (mesh.gpumesh.home / "ran").exists()


async def test_what_it_says_is_shown_and_written_as_text(hostile: SimulatedMesh) -> None:
    gpumesh = hostile.gpumesh
    for arguments in (
        ("status",),
        ("models",),
        ("audit",),
        ("audit", "--json"),
        ("status", "--json"),
        ("config", "show"),
    ):
        safe(await gpumesh(*arguments, code=None), hostile)
    ended = await gpumesh("run", "-m", CALLED + "x", "hello", code=None)
    safe(ended, hostile)
    hint = next(line for line in ended.err.splitlines() if "models pull" in line)
    folder = gpumesh.home / "pasted"
    folder.mkdir()
    check_safe_to_paste(hint[hint.rindex("pulled to") :], CALLED + "x", folder)


async def test_mesh_yaml_has_what_it_says_as_it_is(hostile: SimulatedMesh) -> None:
    gpumesh = hostile.gpumesh
    wrong = {"hostname": "old", "gpu": "old"}
    hostile.write([hostile.node("alpha", expect=wrong)])
    safe(await gpumesh("audit", "--write", "--yes", code=None), hostile)
    corrected = config.parse(
        gpumesh.config.read_text(), file="mesh.yaml", env=gpumesh.environment(), home=environment.home()
    )
    assert corrected.nodes[0].expect.hostname == "old", "what is no host's name is not taken for one"
    assert corrected.nodes[0].expect.gpu == printable(GPU)

    port = hostile.hosts["alpha"].ssh_port
    line = f"alpha=ssh root@127.0.0.1 -p {port} -i {hostile.ssh['identity_file']}"
    written = gpumesh.home / "a 'b' $(touch ran).yaml"
    ended = await gpumesh("init", "--from", line, "--yes", "-O", str(written), code=None)
    safe(ended, hostile)
    assert "gpumesh run -c '" in ended.out
    read = config.parse(written.read_text(), file="mesh.yaml", env=gpumesh.environment(), home=environment.home())
    expect = read.nodes[0].expect
    assert expect.hostname is None
    assert expect.gpu == printable(GPU)
    assert set(expect.models) == {printable(name) for name in (*NAMES, "qwen2.5:7b")} - {""}
