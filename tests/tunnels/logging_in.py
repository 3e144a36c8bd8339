"""Logs in to a host by a transport, for the tests of logins."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.config.ssh import ssh_config
from gpumesh.errors import TunnelError
from gpumesh.topology import SshSpec
from gpumesh.tunnels.transport import ConnectFunction, ConnectRequest
from tests.tunnels.recorded_events import RecordedEvents


@contextlib.asynccontextmanager
async def logged_in(
    connect: ConnectFunction, ssh: SshSpec, folder: Path, *, person: RecordedEvents | None = None, **secrets: str
) -> AsyncIterator[None]:
    """Logs in with these secrets, and shows that the host answers."""
    request = ConnectRequest("iceland", ssh, (), tuple(secrets.items()), person is not None, str(folder))
    connection = await connect(request, (), person or RecordedEvents())
    try:
        assert await connection.ping(10.0) is not None
        yield
    finally:
        await connection.close()
        for path in folder.iterdir():
            path.unlink()


async def log_in(
    connect: ConnectFunction, ssh: SshSpec, folder: Path, *, person: RecordedEvents | None = None, **secrets: str
) -> None:
    async with logged_in(connect, ssh, folder, person=person, **secrets):
        pass


async def get_refusal(
    connect: ConnectFunction, ssh: SshSpec, folder: Path, *, person: RecordedEvents | None = None, **secrets: str
) -> TunnelError:
    with pytest.raises(TunnelError) as caught:
        await log_in(connect, ssh, folder, person=person, **secrets)
    for path in folder.iterdir():
        path.unlink()
    return caught.value


def read_spec(home: Path, ssh_section: str, ssh_config_text: str) -> SshSpec:
    """The node that mesh.yaml's section ``ssh`` and ~/.ssh/config describe together."""
    file = home / ".ssh" / "config"
    file.write_text(ssh_config_text)
    file.chmod(0o600)
    topology = config.parse(
        f"version: 1\nnodes: [{{name: n, ssh: {ssh_section}}}]\n",
        file="mesh.yaml",
        env={},
        home=home,
        resolve_alias=lambda alias: ssh_config.resolve_alias(alias, home=home),
    )
    ssh = topology.nodes[0].ssh
    assert ssh is not None
    return ssh
