"""Hosts as processes: killed, frozen, started again. And SimHost, which is what runs in each (lab/host.py)."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from gpumesh import config
from gpumesh.errors import GPUMeshError
from gpumesh.lab import profile
from gpumesh.lab.lab import Lab
from gpumesh.lab.profile import Faults
from tests.http_clients import loopback_client
from tests.tunnels.polling import alive, wait_until

pytestmark = pytest.mark.slow

HOSTS = (
    profile.make_instant_host("one"),
    profile.make_instant_host("two"),
    profile.make_instant_host("direct", ssh=False),
)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with Lab(HOSTS, tmp_path) as made:
        yield made


async def version(lab: Lab, name: str) -> str:
    async with loopback_client(timeout=10) as http:
        return str((await http.get(f"{lab.host(name).backend_url}/api/version")).json()["version"])


async def test_a_killed_host_comes_back_at_the_same_address(lab: Lab) -> None:
    host = lab.host("one")
    before, pid = host.node_entry(), host.pid
    await host.kill()
    assert host.pid is None
    with pytest.raises(httpx.ConnectError):
        await version(lab, "one")
    with pytest.raises(GPUMeshError, match="one does not run"):
        await host.counters()
    await host.restart()
    assert host.pid != pid
    assert host.node_entry() == before
    assert await version(lab, "one") == "0.12.6-lab"


async def test_faults_and_counters_reach_the_process(lab: Lab) -> None:
    host = lab.host("two")
    await host.set_faults(Faults(status=500, paths=("/api/version",)))
    with pytest.raises(KeyError):
        await version(lab, "two")
    await host.set_faults(Faults())
    assert await version(lab, "two") == "0.12.6-lab"
    assert (await host.counters()).http == 2


async def test_a_frozen_host_is_silent_until_it_thaws(lab: Lab) -> None:
    lab.host("one").freeze()
    asking = asyncio.create_task(version(lab, "one"))
    assert await version(lab, "two") == "0.12.6-lab"
    assert not asking.done()
    lab.host("one").thaw()
    assert await asking == "0.12.6-lab"


async def test_mesh_yaml_of_the_lab(lab: Lab, tmp_path: Path) -> None:
    topology = config.load(lab.write_config(tmp_path / "mesh.yaml", default_model="qwen2.5:7b"))
    one, two, direct = topology.nodes
    assert one.ssh is not None
    assert one.ssh.port == lab.host("one").ssh_port
    assert two.ssh is not None
    assert one.ssh.identity_files == two.ssh.identity_files == (lab.identity,)
    assert direct.ssh is None
    assert direct.backend.targets[0].port == lab.host("direct").backend_port
    assert lab.identity.stat().st_mode & 0o777 == 0o600


async def test_nothing_is_left_when_it_closes_not_even_of_a_frozen_host(tmp_path: Path) -> None:
    async with Lab(HOSTS, tmp_path) as lab:
        pids = [host.pid for host in lab.hosts.values() if host.pid is not None]
        lab.host("one").freeze()
        await lab.host("two").kill()
    assert len(pids) == 3
    assert not any(alive(pid) for pid in pids)


async def test_a_host_that_cannot_start_is_named_and_the_others_are_ended(tmp_path: Path) -> None:
    async with Lab((profile.make_instant_host("taken", ssh=False),), tmp_path) as other:
        (tmp_path / "second").mkdir()
        lab = Lab(
            (profile.make_instant_host("fine"), profile.make_instant_host("taken", ssh=False)), tmp_path / "second"
        )
        lab.host("taken").backend_port = other.host("taken").backend_port
        with pytest.raises(GPUMeshError, match=r"taken does not run: .*[Aa]ddress already in use"):
            await lab.__aenter__()
        assert lab.host("fine").pid is None


async def test_a_host_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from gpumesh.lab import profile\n"
        "from gpumesh.lab.lab import Lab\n"
        "async def main():\n"
        "    async with Lab((profile.make_instant_host('one'),), pathlib.Path(sys.argv[1])) as lab:\n"
        "        print(lab.host('one').pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    import sys

    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    await parent.wait()
    await wait_until(lambda: not alive(pid), "the host ended")


def test_its_file_is_yaml_that_a_person_can_read(tmp_path: Path) -> None:
    lab = Lab(HOSTS[2:], tmp_path)
    text = lab.write_config(tmp_path / "mesh.yaml", gateway={"policy": "round-robin"}).read_text()
    assert '  - name: "direct"\n' in text
    assert f"gateway: {json.dumps({'listen': '127.0.0.1:0', 'policy': 'round-robin'})}\n" in text
