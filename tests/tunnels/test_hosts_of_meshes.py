"""Host keys of several meshes of one user, over both transports, against real OpenSSH servers behind one address."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpumesh.errors import HostKeyChanged, HostKeyUnknown
from gpumesh.topology import HostKeyPolicy, TransportKind
from gpumesh.tunnels.known_hosts import host_key_alias, read_known_hosts
from gpumesh.tunnels.transport import ConnectRequest
from gpumesh.tunnels.transports import load_connect
from tests.prerequisites import needs
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]

NODE = "gpu"
HOME, WORK = "/home/ada/mesh.yaml", "/work/mesh.yaml"


@dataclass
class Pods:
    """Two pods behind one address: two ports, two host keys. ``known_hosts`` is the file of their user."""

    first: Sshd
    second: Sshd
    transport: TransportKind
    folder: Path
    known_hosts: Path

    async def connect(
        self, pod: Sshd, mesh: str, *, node: str = NODE, policy: HostKeyPolicy = HostKeyPolicy.STRICT
    ) -> None:
        """Connects as the node of this mesh, and closes the connection. Raises TunnelError."""
        ssh = pod.spec(known_hosts=self.known_hosts, host_key_policy=policy, identity_files=(self.first.identity,))
        request = ConnectRequest(node, ssh, (), control_dir=str(self.folder), mesh=mesh)
        connection = await load_connect(self.transport)(request, [], RecordedEvents())
        await connection.close()

    def names(self) -> list[str]:
        return [entry.hosts for entry in read_known_hosts(self.known_hosts).entries]


@pytest.fixture(params=list(TransportKind))
async def pods(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pods]:
    folder = tmp_path_factory.mktemp("c")
    folder.chmod(0o700)
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(Sshd(tmp_path / name, {"LogLevel": "INFO"})) for name in ("one", "two")
        ]
        second.authorized_keys.write_text(first.authorized_keys.read_text())
        yield Pods(first, second, request.param, folder, tmp_path / "known_hosts")


async def test_two_meshes_may_have_a_node_of_the_same_name(pods: Pods) -> None:
    await pods.connect(pods.first, HOME, policy=HostKeyPolicy.ACCEPT_NEW)
    await pods.connect(pods.second, WORK, policy=HostKeyPolicy.ACCEPT_NEW)
    for _ in range(2):  # one does not replace the other
        await pods.connect(pods.first, HOME)
        await pods.connect(pods.second, WORK)
    with pytest.raises(HostKeyChanged):
        await pods.connect(pods.second, HOME)
    known = read_known_hosts(pods.known_hosts)  # OpenSSH may have hashed the names
    assert known.keys_for(host_key_alias(NODE, HOME))
    assert not known.keys_for(host_key_alias(NODE))


async def test_two_pods_behind_one_address_are_two_hosts(pods: Pods) -> None:
    await pods.connect(pods.first, HOME, node="a", policy=HostKeyPolicy.ACCEPT_NEW)
    await pods.connect(pods.second, HOME, node="b", policy=HostKeyPolicy.ACCEPT_NEW)
    first, second = pods.first, pods.second
    await first.stop()
    await second.stop()
    first.port, second.port = second.port, first.port  # each pod comes back at the port of the other
    await first.start()
    await second.start()
    await pods.connect(first, HOME, node="a")
    await pods.connect(second, HOME, node="b")
    with pytest.raises(HostKeyChanged):
        await pods.connect(second, HOME, node="a")


async def test_a_key_that_an_earlier_version_recorded_is_kept_for_the_mesh_that_has_the_host(pods: Pods) -> None:
    pods.known_hosts.write_text(f"{host_key_alias(NODE)} {pods.first.public_host_key}\n")  # the pod has moved since
    with pytest.raises(HostKeyChanged):
        await pods.connect(pods.second, WORK)  # whose node that is, is not known yet: nothing but safe
    await pods.connect(pods.first, HOME)
    assert pods.names() == [host_key_alias(NODE, HOME), f"[127.0.0.1]:{pods.first.port}"]
    await pods.connect(pods.first, "/a/copy/of/mesh.yaml")  # which has relied on the same line
    with pytest.raises(HostKeyUnknown):
        await pods.connect(pods.second, WORK)  # no attack: the node of another mesh
    await pods.connect(pods.second, WORK, policy=HostKeyPolicy.ACCEPT_NEW)
    with pytest.raises(HostKeyChanged):
        await pods.connect(pods.second, HOME, policy=HostKeyPolicy.ACCEPT_NEW)
