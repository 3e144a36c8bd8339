"""Asks a host for its key with the system's ``ssh``, which ends before any login. ``gpumesh trust`` uses this."""

from __future__ import annotations

import asyncio
import time

from gpumesh.topology import SshSpec, Target
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.known_hosts import HostKey, read_known_hosts
from gpumesh.tunnels.local_system.socket_folders import private_folder
from gpumesh.tunnels.openssh.fixed_options import read_unknown_options
from gpumesh.tunnels.openssh.login import timeout_error
from gpumesh.tunnels.openssh.master import OpensshMaster
from gpumesh.tunnels.openssh.options import format_destination, host_key_command
from gpumesh.tunnels.openssh.prompts import AskpassServer
from gpumesh.tunnels.openssh.ssh_output import log_path
from gpumesh.tunnels.transport import ConnectRequest


async def fetch_host_key(
    node: str, ssh: SshSpec, *, mesh: str = "", secrets: tuple[tuple[str, str], ...] = (), timeout_s: float = 10.0
) -> HostKey:
    """Returns the key that the host shows now, trusted or not. Logs in to jump hosts only. Raises ``TunnelError``."""
    with private_folder() as folder:
        known_hosts = folder / "k"  # ssh itself writes the key into this file
        setup = ConnectRequest(node, ssh, targets=(), secrets=secrets, control_dir=str(folder), mesh=mesh)
        deadline = Deadline(timeout_s, time.monotonic)
        async with AskpassServer(folder, dict(secrets), _NoEvents(), deadline, interactive=False) as prompts:
            unknown = await read_unknown_options()
            control = folder / "c"  # no master, and it makes no control socket: only its process and its log are used
            command = host_key_command(
                setup, known_hosts, batch=not prompts.can_answer, unknown=unknown, log=log_path(control)
            )
            askpass = prompts.askpass_path if prompts.can_answer else None
            child = await OpensshMaster.start(command, control, askpass)
            try:
                await asyncio.wait([child.exit_task], timeout=timeout_s)
                ended_in_time = child.exit_task.done()
            finally:
                await child.close()
        entries = read_known_hosts(known_hosts).entries
        if entries:
            return entries[0].key
        if not ended_in_time:
            raise timeout_error(child, ssh, timeout_s)
        raise child.output.make_error(format_destination(ssh))


class _NoEvents:
    """The ``ConnectionEvents`` for an ssh that forwards nothing and asks no person."""

    async def ask_person(self, text: str, *, echo: bool) -> str | None:  # noqa: ARG002 - no person is asked
        return None

    def report_forward_failed(self, target: Target, code: str, message: str) -> None:
        """Is never called: nothing is forwarded."""

    def report_peer_refused(self, port: int, uid: int) -> None:
        """Is never called: there are no local ports."""
