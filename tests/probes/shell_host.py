"""A host whose commands are run by a real shell here: `nvidia-smi` on its PATH says what a test wants it to say."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpumesh.errors import ExecError
from gpumesh.probes.smi_tables import FIELDS, OLD_FIELDS
from gpumesh.tunnels.base import ExecResult

UUID = "GPU-8f2c1d5e-3b6a-4c1f-9a77-0a1b2c3d4e5f"
OTHER_UUID = "GPU-31bd7a90-55aa-4e0e-8c11-9d8c7b6a5f4e"
# As captured (docs/internals/nvidia-smi.md): an idle card, a busy one, the parent of MIG slices.
IDLE = (
    f"0, {UUID}, 00000000:01:00.0, NVIDIA GeForce RTX 4080 SUPER, 595.71.05, 16376, 596, 15348, 0, 23, 43, 26.20,"
    " 320.00, 210, 0, P8, Disabled, 0x0000000000000001"
)
BUSY = (
    f"0, {UUID}, 00000000:01:00.0, NVIDIA GeForce RTX 4080 SUPER, 595.71.05, 16376, 1474, 14470, 7, 2, 46, 84.24,"
    " 320.00, 2805, 0, P2, Disabled, 0x0000000000000000"
)
MIG = (
    f"0, {OTHER_UUID}, 00000000:00:09.0, NVIDIA H100 80GB HBM3, 590.48.01, 81559, 11125, 69956, [N/A], [N/A], 53,"
    " 433.78, 700.00, 1980, [N/A], P0, Enabled, 0x0000000000000000"
)
GOOD = {
    "index": "0",
    "uuid": UUID,
    "pci.bus_id": "00000000:01:00.0",
    "name": "NVIDIA GeForce RTX 4090",
    "driver_version": "550.54.15",
    "memory.total": "24564",
    "memory.used": "5632",
    "memory.free": "18560",
    "utilization.gpu": "42",
    "utilization.memory": "23",
    "temperature.gpu": "61",
    "power.draw": "212.50",
    "power.limit": "450.00",
    "clocks.sm": "2640",
    "fan.speed": "46",
    "pstate": "P2",
    "persistence_mode": "Enabled",
    "clocks_throttle_reasons.active": "0x0000000000000000",
}


def row(fields: Sequence[str] = FIELDS, **changes: str) -> str:
    """A 4090's row. ``changes`` are by the field's name, ``_`` for its dots."""
    known = {name.replace(".", "_"): name for name in GOOD}
    values = {**GOOD, **{known[name]: value for name, value in changes.items()}}
    return ", ".join(values[name] for name in fields)


def old_row(**changes: str) -> str:
    return row(OLD_FIELDS, **changes)


@dataclass(frozen=True)
class SmiAnswer:
    """What nvidia-smi says and how it ends, for arguments among which ``when`` stands."""

    text: str | bytes = ""
    status: int = 0
    when: str = ""


@dataclass
class ShellHost:
    """``exec`` is a ``RunCommand`` (probes/commands/combined_commands.py): it runs the command here, in ``folder``,
    without this user's PATH.

    ``calls`` are the commands that were run."""

    folder: Path
    calls: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def command(self, name: str, body: str) -> None:
        self.bin.mkdir(exist_ok=True)
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def nvidia_smi(self, *answers: SmiAnswer) -> None:
        """The first answer that fits is given."""
        lines = ['case " $* " in']
        for number, answer in enumerate(answers):
            answer_file = self.folder / f"answer{number}"
            answer_file.write_bytes(answer.text if isinstance(answer.text, bytes) else answer.text.encode())
            lines.append(f'*"{answer.when}"*) cat {answer_file}; exit {answer.status};;')
        lines.append("esac")
        self.command("nvidia-smi", "\n".join(lines))

    async def exec(self, argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        self.calls.append(tuple(argv))
        async with self._running(argv) as process:
            try:
                async with asyncio.timeout(timeout_s):
                    out, err = await process.communicate()
            except TimeoutError as error:
                raise ExecError(f"no end of {argv[0]!r} within {timeout_s:g} s") from error
        status = process.returncode
        return ExecResult(status if status is not None and status >= 0 else None, out, err)

    @contextlib.asynccontextmanager
    async def _running(self, argv: Sequence[str]) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": f"{self.bin}:{os.defpath}", "HOME": str(self.folder)},
            cwd=self.folder,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            await process.wait()
