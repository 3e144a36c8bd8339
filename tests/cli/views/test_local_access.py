"""Who on this machine can connect: as `up` and `status -v` say it, and with everything on Unix sockets."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.cli.views.local_access import access_lines
from gpumesh.state import GatewayPhase, GatewayState, LocalAccess, MeshState
from tests.cli.meshes import SimulatedMesh
from tests.cli.states import healthy, mesh
from tests.prerequisites import needs
from tests.tunnels.other_user import ANOTHER, connect_as

slow = pytest.mark.slow


def state(access: LocalAccess, *, socket: str | None = None) -> MeshState:
    first = healthy("one")
    unix = replace(first.tunnel, local_port=None, local_socket=socket, local_access=access)
    port = replace(first.tunnel, local_access=access)
    return mesh(
        replace(first, tunnel=unix if socket else port), replace(first, name="two", tunnel=unix if socket else port)
    )


@pytest.mark.parametrize(
    ("access", "words"),
    [
        (LocalAccess.OWN_USER, "for your own user and root"),
        (LocalAccess.ANY_USER, "every user of this machine can use it (`tunnels.share`)"),
        (LocalAccess.UNCHECKED, "this system does not tell whose a connection is (`tunnels: {listen: unix}` keeps"),
    ],
)
def test_of_the_tunnels(access: LocalAccess, words: str) -> None:
    (line,) = (line for line in access_lines(state(access)) if line.startswith("tunnels"))
    assert line.startswith("tunnels one at 127.0.0.1:40123, two at 127.0.0.1:40123: ")
    assert words in line
    lines = list(access_lines(state(LocalAccess.OWN_USER, socket="/run/x.sock")))
    assert lines[-1] == "tunnels one at unix:/run/x.sock, two at unix:/run/x.sock: for your own user and root"


@pytest.mark.parametrize(
    ("gateway", "line"),
    [
        (GatewayState("http://127.0.0.1:1", GatewayPhase.SERVING, access=LocalAccess.ANY_USER), "every user of this"),
        (GatewayState("http://127.0.0.1:1", GatewayPhase.SERVING, access=LocalAccess.KEY), "whoever sends the key"),
        (
            GatewayState("unix:/g", GatewayPhase.SERVING, socket="/g", access=LocalAccess.OWN_USER),
            "gateway unix:/g: for your own user and root",
        ),
        (
            GatewayState("http://h:1", GatewayPhase.SERVING, socket="/g", access=LocalAccess.ANY_USER),
            "gateway http://h:1 and unix:/g: every user",
        ),
    ],
)
def test_of_the_gateway(gateway: GatewayState, line: str) -> None:
    assert line in next(access_lines(replace(state(LocalAccess.OWN_USER), gateway=gateway)))


@slow
async def test_up_and_status_say_it(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    up = await gpumesh("up", "-d")
    url = (await gpumesh("status", "--json")).json()["gateway"]["url"]
    assert f"{url}: every user of this machine can use it: no key is asked for" in up.err
    told = (await gpumesh("status", "-v")).out
    assert "tunnels alpha at 127.0.0.1:" in told
    assert "for your own user and root" in told
    await gpumesh("down")


def on_unix_sockets(made: SimulatedMesh, gateway: Path) -> None:
    """Its mesh.yaml, without a single port."""
    document = json.loads(made.write(listen=f"unix:{gateway}").read_text())
    made.gpumesh.config.write_text(json.dumps({**document, "tunnels": {"listen": "unix"}}))


@slow
async def test_everything_works_without_a_port(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    path = gpumesh.runtime / "g.sock"
    on_unix_sockets(two, path)
    up = await gpumesh("up", "-d")
    assert f"serving unix:{path};" in up.err
    assert "every user" not in up.err
    try:
        status = (await gpumesh("status", "--json", "--check")).json()
        assert status["gateway"]["url"] == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for each in status["nodes"]:
            tunnel = each["tunnel"]
            assert (tunnel["local_port"], tunnel["local_access"]) == (None, "own-user")
            assert tunnel["local_socket"] == str(gpumesh.runtime / "gpumesh" / f"tested-{each['name']}.sock")
            assert each["backend"]["url"] == f"http://unix:{tunnel['local_socket']}:"
        assert "hello" in (await gpumesh("run", "--node", "alpha", "say hello", "--json")).out
        assert "qwen2.5:7b" in (await gpumesh("models")).out
        await gpumesh("models", "load", "qwen2.5:7b", "--all")
        await gpumesh("audit", "--json")
        overhead = await gpumesh(
            "bench", "run", "--scenario", "overhead", "-n", "4", "--out", str(gpumesh.runtime / "b")
        )
        assert "gateway" in overhead.out
        ended = await gpumesh("env", code=2)
        assert ended.out == ""
        assert f"the gateway listens on the Unix socket {path} alone" in ended.err
        assert f"curl --unix-socket {path} http://localhost/api/tags" in ended.err
    finally:
        await gpumesh("down")
    assert not path.exists()
    assert list((gpumesh.runtime / "gpumesh").glob("*.sock")) == []
    assert "Unix socket" in (await gpumesh("env", code=2)).err  # of mesh.yaml, too


@slow
async def test_without_a_running_mesh_too(two: SimulatedMesh) -> None:
    on_unix_sockets(two, two.gpumesh.runtime / "g.sock")
    assert "2 of 2 nodes up" in (await two.gpumesh("status")).out


@slow
async def test_killed_and_started_again(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    path = gpumesh.runtime / "g.sock"
    on_unix_sockets(two, path)
    await gpumesh("up", "-d")
    names = sorted(each["tunnel"]["local_socket"] for each in (await gpumesh("status", "--json")).json()["nodes"])
    gpumesh.kill_all()
    assert path.is_socket()
    await gpumesh("up", "-d")
    status = (await gpumesh("status", "--json", "--check")).json()
    assert sorted(each["tunnel"]["local_socket"] for each in status["nodes"]) == names
    await gpumesh("down")


@slow
async def test_on_the_command_line(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    path = gpumesh.runtime / "g.sock"
    await gpumesh("up", "-d", "--listen", f"127.0.0.1:0,unix:{path}")
    gateway = (await gpumesh("status", "--json")).json()["gateway"]
    assert gateway["url"].startswith("http://127.0.0.1:")
    assert (gateway["socket"], gateway["access"]) == (str(path), "any-user")
    assert f"export OLLAMA_HOST={gateway['url']}" in (await gpumesh("env", "--shell", "sh")).out
    await gpumesh("down")
    path.write_text("precious")
    ended = await gpumesh("up", "-d", "--listen", f"unix:{path}", code=1)
    assert "is no socket" in ended.err
    assert path.read_text() == "precious"


@slow
@needs("root")
async def test_who_was_refused_stands_in_the_log(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    await gpumesh("up", "-d")
    alpha = (await gpumesh("status", "--json")).json()["nodes"][0]["tunnel"]["local_port"]
    assert await connect_as(alpha, uid=ANOTHER) == "reset"
    assert await connect_as(alpha, uid=ANOTHER) == "reset"
    await gpumesh("down")
    told = [line for line in (await gpumesh("logs")).out.splitlines() if "tried to connect" in line]
    assert len(told) == 1
    assert f"uid {ANOTHER}" in told[0]
    assert "tunnels: {share: true}" in told[0]
