"""Starts several simulated hosts, each in its own process, and writes a mesh.yaml of these hosts.

::

    async with Lab(demo_hosts.make_hosts(3), folder) as lab:
        file = lab.write_config(folder / "mesh.yaml", listen="127.0.0.1:0")
        await lab.host("tromso").kill()
        await lab.host("tromso").restart()
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from gpumesh.config import environment
from gpumesh.errors import GPUMeshError
from gpumesh.lab import keys
from gpumesh.lab.host import LINE_LIMIT, HostStart
from gpumesh.lab.profile import Faults, HostProfile, SimCounters
from gpumesh.wire import from_json, to_json

# Seconds to wait for any reply of a host. The first reply takes longest: Python and paramiko load, on a busy machine.
REPLY_TIMEOUT_S = 30.0
# aiohttp reads all certificates of this machine when it is imported: a sixth of the start of a host, which uses none.
NO_CERTIFICATES = {"SSL_CERT_FILE": os.devnull}
STOP_TIMEOUT_S = 2.0  # seconds for a host's process to end by itself; then it is killed


class LabHost:
    """One simulated host in a process of its own. An async context manager that starts and ends this process.

    A restart keeps the ports and the keys, as a restart of a workstation does. A method that asks the host raises
    GPUMeshError when its process has ended.
    """

    def __init__(self, profile: HostProfile, folder: Path, *, authorized: Sequence[str]) -> None:
        self.profile = profile
        self.name = profile.name
        self.ssh_port: int | None = None
        self.backend_port = 0
        self._log = folder / f"{profile.name}.log"
        self._host_key = keys.new_key()
        self._authorized = tuple(authorized)
        self._process: asyncio.subprocess.Process | None = None
        self._ask_lock = asyncio.Lock()  # one question at a time: a reply does not name its question

    async def __aenter__(self) -> Self:
        try:
            await self.restart()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    # -- properties --------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The process id of the host; ``None`` while its process does not run."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    @property
    def backend_url(self) -> str:
        """The URL of the host's inference server, for a client that connects to it without SSH."""
        return f"http://{keys.LOOPBACK_HOST}:{self.backend_port}"

    @property
    def known_hosts_line(self) -> str:
        """The line for this host in a known_hosts file."""
        assert self.ssh_port is not None, "this host has no SSH, and so no host key"
        return keys.known_hosts_line(self._host_key, self.ssh_port)

    def node_entry(self, **changes: Any) -> dict[str, Any]:
        """The host's entry in the ``nodes`` of mesh.yaml. User, key and known_hosts are in the file's ``defaults``.

        ``changes`` are keys that replace the entry's own, or are added. Without SSH, the node is a direct node.
        """
        entry: dict[str, Any] = {"name": self.name}
        if self.ssh_port is None:
            entry["backend"] = {"kind": "ollama", "url": self.backend_url}
        else:
            entry["ssh"] = {"host": keys.LOOPBACK_HOST, "port": self.ssh_port}
            entry["backend"] = {"kind": "ollama", "port": self.profile.backend_port}
        return {**entry, **changes}

    # -- actions ------------------------------------------------------------------------------------------

    async def kill(self) -> None:
        """Kills the host's process (SIGKILL): its connections are reset, and its ports refuse."""
        process = self._process
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def restart(self) -> None:
        """Ends the process and starts a new one with the same ports and keys, and waits until the new one is ready.

        Loaded models and counters are lost. The first start, which ``__aenter__`` makes, has no process to end.
        """
        await self.kill()
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "gpumesh.lab.host"),  # -P: no modules of the working directory
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                limit=LINE_LIMIT,
                env=environment.child_environment(NO_CERTIFICATES),
                start_new_session=True,  # a Ctrl-C in the terminal must not reach the host
            )
        # At the first start, both ports are 0: the host chooses them.
        start = HostStart(self.profile, self._host_key, self._authorized, self.ssh_port or 0, self.backend_port)
        reply = await self._ask(to_json(start))
        self.ssh_port, self.backend_port = reply["ssh_port"], reply["backend_port"]

    def freeze(self) -> None:
        """Stops the process (SIGSTOP): the kernel still accepts bytes, but no answer comes, as from a host that hangs.

        Raises GPUMeshError when the process has ended. ``thaw`` lets the process go on.
        """
        self._send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets a frozen process go on (SIGCONT). Raises GPUMeshError when the process has ended."""
        self._send_signal(signal.SIGCONT)

    async def set_faults(self, faults: Faults) -> None:
        """Replaces the host's faults from now on. ``Faults()`` ends all faults."""
        await self._ask({"ask": "faults", "faults": to_json(faults)})

    async def drop_connections(self) -> None:
        """Cuts the host's SSH connections. Its SSH port stays open."""
        await self._ask({"ask": "drop-connections"})

    async def counters(self) -> SimCounters:
        """Asks the host for its counters since its last start."""
        reply = await self._ask({"ask": "counters"})
        return from_json(SimCounters, reply["counters"])

    def _send_signal(self, signal_number: signal.Signals) -> None:
        """Sends a signal to the host's process. Raises GPUMeshError when the process has ended."""
        if self.pid is None:
            raise self._not_running_error()
        os.kill(self.pid, signal_number)

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Sends one question to the host's process (as in host.py) and returns the reply; both are JSON objects.

        Raises GPUMeshError when the process has ended, when no reply comes in time, and when the reply is an error.
        """
        async with self._ask_lock:
            process = self._process
            if process is None or process.stdin is None or process.stdout is None:  # the pipes only by their types
                raise self._not_running_error()
            try:
                process.stdin.write(json.dumps(question).encode() + b"\n")
                await process.stdin.drain()
                async with asyncio.timeout(REPLY_TIMEOUT_S):
                    line = await process.stdout.readline()
            except ConnectionError as error:
                raise self._not_running_error() from error
            except TimeoutError as error:
                message = f"the simulated host {self.name} did not answer within {REPLY_TIMEOUT_S:.0f} s"
                raise GPUMeshError(message) from error
        if not line:  # the end of the process's output: the process has ended
            await process.wait()
            raise self._not_running_error()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise GPUMeshError(f"the simulated host {self.name}: {reply['error']}")
        return reply

    def _not_running_error(self) -> GPUMeshError:
        """Makes the error for a process that has ended, with the last line of the host's log if there is a line."""
        log_lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        reason = f": {log_lines[-1]}" if log_lines else ""
        return GPUMeshError(f"the simulated host {self.name} does not run{reason}")

    async def _stop(self) -> None:
        """Closes the process's input, which ends the process. Kills the process if it does not end in time."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)  # a frozen process would not notice the end of its input
            assert process.stdin is not None, "the process has no pipe as its standard input"
            process.stdin.close()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                pass  # the process is killed next
            finally:
                await self.kill()  # no effect if the process has ended


class Lab:
    """Several simulated hosts. An async context manager that starts and ends the processes of all hosts together.

    ``folder`` must exist: the user's key, known_hosts and the hosts' logs are written there.
    """

    def __init__(self, profiles: Sequence[HostProfile], folder: Path) -> None:
        self.folder = folder
        self.identity = folder / "id_ed25519"
        self.known_hosts = folder / "known_hosts"
        key = keys.new_key()
        self.identity.touch(mode=0o600)  # before the key is written: ssh refuses a key that others can read
        self.identity.write_text(key)
        self._hosts = {
            profile.name: LabHost(profile, folder, authorized=[keys.public_key_line(key)]) for profile in profiles
        }
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            starts = [stack.enter_async_context(host) for host in self._hosts.values()]
            # Waits for all hosts before an error is raised: so no host is left half started when another fails.
            for result in await asyncio.gather(*starts, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
            ssh_hosts = [host for host in self._hosts.values() if host.ssh_port is not None]
            self.known_hosts.write_text("".join(f"{host.known_hosts_line}\n" for host in ssh_hosts))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def hosts(self) -> Mapping[str, LabHost]:
        """All hosts by name, in the order of ``profiles``."""
        return MappingProxyType(self._hosts)

    def host(self, name: str) -> LabHost:
        """Returns the host of this name. Raises ``KeyError`` when there is no such host."""
        return self._hosts[name]

    def write_config(
        self,
        path: Path,
        *,
        listen: str = "127.0.0.1:0",
        default_model: str | None = None,
        nodes: Sequence[Mapping[str, Any]] | None = None,
        gateway: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes a mesh.yaml of all hosts, or of ``nodes``, to ``path``. Returns ``path``.

        ``nodes`` are entries as ``LabHost.node_entry`` makes them. ``gateway`` holds more keys of the gateway section.
        """
        gateway_section: dict[str, Any] = {"listen": listen}
        if default_model:
            gateway_section["default_model"] = default_model
        gateway_section.update(gateway or {})
        if nodes is None:
            nodes = [host.node_entry() for host in self._hosts.values()]
        first_host = next(iter(self._hosts.values()))
        user = first_host.profile.user  # ``defaults`` has one user, so all hosts of a lab have the same
        ssh = {"user": user, "identity_file": str(self.identity), "known_hosts": str(self.known_hosts), "agent": False}
        lines = ["# A mesh of simulated hosts, made by gpumesh's lab.", "version: 1", "name: lab"]
        lines += [f"gateway: {json.dumps(gateway_section)}", "defaults:", f"  ssh: {json.dumps(ssh)}", "nodes:"]
        for node in nodes:
            for number, (key, value) in enumerate(node.items()):
                dash = "-" if number == 0 else " "  # YAML: a dash begins the next entry of a list
                lines.append(f"  {dash} {key}: {json.dumps(value)}")
        path.write_text("\n".join(lines) + "\n")
        return path
