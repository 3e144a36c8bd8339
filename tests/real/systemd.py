"""A systemd of a test's own: the manager of one user's services, with its own processes and cgroups.

It runs in namespaces. Their first process is bash, and the kernel ends all others with it; bash ends with the test. So
nothing is left behind, whatever happened to the test. The network is the test's own, so the services reach its servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.prerequisites import program
from tests.real.command import LIMIT_S, CommandResult

# In a new mount namespace: makes a cgroup, moves into it, and makes it the root of the namespaces of the second script.
_OUTER = r"""
set -e
mount --make-rprivate /
mount -t cgroup2 none /mnt
mkdir "/mnt/$1"
echo $$ > "/mnt/$1/cgroup.procs"
unshare --cgroup --pid --mount --fork --kill-child bash -c "$2"
"""
# The first process there. It has no systemd as its parent, so it makes what shows programs that systemd runs.
_INNER = r"""
umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs none /run
mkdir -p /run/systemd/system
read -r pid _ </proc/self/stat
echo "first process: $pid"
mount -t proc proc /proc
/usr/lib/systemd/systemd --user &
wait
"""
_REMOVE_CGROUPS = r"""
mount -t cgroup2 none /mnt
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    find "/mnt/$1" -depth -type d -exec rmdir {} + 2>/dev/null && exit
    sleep 0.1
done
"""


@dataclass(frozen=True)
class UserSystemd:
    """``first_process``: its pid as the test sees it. ``environment``: of its services, and of the commands there."""

    first_process: int
    environment: Mapping[str, str]

    async def __call__(self, *command: str, code: int | None = 0) -> CommandResult:
        """Runs a command beside the services."""
        into = (str(program("nsenter")), "-t", str(self.first_process), "--mount", "--pid", "--cgroup")
        process = await asyncio.create_subprocess_exec(
            *into,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(self.environment),
        )
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate()
        ended = CommandResult(process.returncode, out.decode(), err.decode(), 0.0)
        assert code is None or ended.code == code, f"{command}: {ended}"
        return ended

    async def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return (await self("systemctl", "--user", "show", f"--property={name}", "--value", unit)).out.strip()


@contextlib.asynccontextmanager
async def user_systemd(environment: Mapping[str, str]) -> AsyncIterator[UserSystemd]:
    """Starts one. Its units are in ``$HOME/.config/systemd/user``, its sockets in ``$XDG_RUNTIME_DIR``."""
    cgroup = f"gpumesh-{uuid.uuid4().hex}"
    process = await asyncio.create_subprocess_exec(
        str(program("unshare")),
        *("--mount", "bash", "-c", _OUTER, "outer", cgroup, _INNER),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env=dict(environment),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            line = await process.stdout.readline()
            started = UserSystemd(int(line.removeprefix(b"first process: ")), environment)
            private = Path(environment["XDG_RUNTIME_DIR"]) / "systemd" / "private"
            while not private.exists():
                await asyncio.sleep(0.02)
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        await process.wait()
        _remove_cgroups(cgroup)


def _remove_cgroups(name: str) -> None:
    """Removes the cgroups, whose processes have ended or end now. Without this the kernel would keep them empty."""
    arguments = ("--mount", "bash", "-c", _REMOVE_CGROUPS, "remove", name)
    subprocess.run([str(program("unshare")), *arguments], check=False, timeout=20)
