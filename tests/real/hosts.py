"""GPU hosts made of real parts: OpenSSH's sshd, a real inference server behind it, and an nvidia-smi on its PATH.

Only the GPU is not there: a script answers for it, in the real tool's own words (facts: nvidia-smi.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from tests.http_clients import loopback_client
from tests.prerequisites import llama_server
from tests.tunnels.sshd import Sshd

GPU = "NVIDIA GeForce RTX 4090"
VRAM_MIB = 24564
DRIVER = "550.54.15"
UTILIZATION_PCT = 37

# Answers by position, as the real one does; what it was asked for is checked, so that a new field is noticed here.
_NVIDIA_SMI = """\
#!/bin/sh
mode=$(cat '{folder}/mode')
if [ "$mode" = hang ]; then exec sleep 600; fi
case "$*" in
*--query-compute-apps=*) exit 0 ;;
*--query-gpu=*) ;;
*) echo "Invalid combination of input arguments."; exit 2 ;;
esac
fields=$(echo "$*" | sed 's/.*--query-gpu=\\([^ ]*\\).*/\\1/' | tr , ' ')
line=
for field in $fields; do
    case $field in
    index) value=0 ;;
    uuid) value={uuid} ;;
    pci.bus_id) value=00000000:01:00.0 ;;
    name) value=$(cat '{folder}/name') ;;
    driver_version) value={driver} ;;
    memory.total) value={total} ;;
    memory.used) value=5632 ;;
    memory.free) value=18560 ;;
    utilization.gpu) value={utilization} ;;
    utilization.memory) value=12 ;;
    temperature.gpu) value=41 ;;
    power.draw) value=62.50 ;;
    power.limit) value=450.00 ;;
    clocks.sm) value=2520 ;;
    fan.speed) value='[N/A]' ;;
    pstate) value=P2 ;;
    persistence_mode) value=Enabled ;;
    clocks_throttle_reasons.active) value=0x0000000000000000 ;;
    *) echo "Field \\"$field\\" is not a valid field to query."; exit 2 ;;
    esac
    line="$line, $value"
done
printf '%s\\n' "${{line#, }}"
"""


@dataclass
class RealHost:
    """A context manager. ``backend`` is mesh.yaml's ``backend`` of this host, as the host itself sees its server."""

    name: str
    folder: Path
    backend: dict[str, Any]
    sshd: Sshd = field(init=False)

    def __post_init__(self) -> None:
        programs = self.folder / "bin"
        programs.mkdir(parents=True)
        self.set_smi_mode("ok")
        self.set_gpu_name(GPU)
        script = programs / "nvidia-smi"
        script.write_text(
            _NVIDIA_SMI.format(
                folder=self.folder, uuid=self.uuid, driver=DRIVER, total=VRAM_MIB, utilization=UTILIZATION_PCT
            )
        )
        script.chmod(0o755)
        # A home of its own: a shell that sshd starts reads ~/.bashrc, and whoever runs the tests may have one.
        surroundings = f"HOME={self.folder} PATH={programs}:/usr/local/bin:/usr/bin:/bin"
        self.sshd = Sshd(self.folder / "sshd", {"SetEnv": surroundings})

    @property
    def uuid(self) -> str:
        return f"GPU-00000000-0000-4000-8000-{self.name.encode().hex()[:12]:0>12}"

    def set_smi_mode(self, mode: str) -> None:
        """``ok``, or ``hang``: nvidia-smi never answers."""
        (self.folder / "mode").write_text(mode)

    def set_gpu_name(self, name: str) -> None:
        (self.folder / "name").write_text(name)

    def node(self, **changes: Any) -> dict[str, Any]:
        """Its entry in mesh.yaml."""
        ssh = {
            "host": "127.0.0.1",
            "port": self.sshd.port,
            "user": self.sshd.spec().user,
            "identity_file": str(self.sshd.identity),
            "known_hosts": str(self.sshd.known_hosts),
            "agent": False,
            **changes.pop("ssh", {}),
        }
        return {"name": self.name, "ssh": ssh, "backend": self.backend, **changes}

    async def __aenter__(self) -> Self:
        await self.sshd.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.sshd.stop()


@dataclass
class LlamaServer:
    """llama.cpp's server with ``model``, on a loopback port; knows it as ``alias``. ``options`` are further arguments.
    A context manager."""

    model: Path
    alias: str = "tiny"
    slots: int = 2
    context: int = 2048
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def backend(self) -> dict[str, Any]:
        return {"kind": "openai", "port": self.port}

    async def __aenter__(self) -> Self:
        binary = llama_server()
        assert binary is not None
        self.port = free_port()
        log = self.model.with_name(f"llama-{self.port}.log")
        command = [str(binary), "-m", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["-c", str(self.context * self.slots), "-np", str(self.slots), "-t", "1", "--alias", self.alias]
        command += ["--metrics", "--slots", "--no-ui", "--no-warmup", "--offline", "--device", "none", *self.options]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "LD_LIBRARY_PATH": str(binary.parent)},
            )
        try:
            await self._healthy(log)
        except BaseException:
            await self._stop()
            raise
        return self

    async def _healthy(self, log: Path) -> None:
        assert self.process is not None
        async with asyncio.timeout(30), loopback_client() as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{self.url}/health")).status_code == 200:
                        return
                assert self.process.poll() is None, log.read_text(errors="replace")
                await asyncio.sleep(0.02)

    async def busy(self) -> int:
        """How many of its slots generate now."""
        async with loopback_client(timeout=10) as client:
            slots = (await client.get(f"{self.url}/slots")).json()
        return sum(slot["is_processing"] for slot in slots)

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    async def _stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(self.process.wait)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@contextlib.asynccontextmanager
async def hosts(folder: Path, backends: Sequence[dict[str, Any]]) -> AsyncIterator[list[RealHost]]:
    """A host for each backend, named ``alpha``, ``beta`` …"""
    async with contextlib.AsyncExitStack() as stack:
        names = ("alpha", "beta", "gamma")
        made = [RealHost(names[number], folder / names[number], entry) for number, entry in enumerate(backends)]
        for host in made:
            await stack.enter_async_context(host)
        yield made
