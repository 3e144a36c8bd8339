"""In child processes, because neither setting can be undone."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.tunnels.polling import alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")


async def start(script: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, *arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3],
    )  # fmt: skip


async def line_of(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 30)).strip()


TITLE = """
import sys
from gpumesh.tunnels.local_system.child_process import set_title
set_title(sys.argv[1])
print("done", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("title", ["gpumesh tunnel iceland", "gpumesh tunnel eyjafjallajökull", "x" * 5000, ""])
async def test_a_title_replaces_all_arguments(title: str) -> None:
    process = await start(TITLE, title, "an argument that is to be gone")
    assert await line_of(process) == b"done"
    shown = Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\0")
    expected = title.encode("ascii", "replace")
    assert shown == expected[: len(shown)]
    assert len(shown) == len(expected) or len(expected) > 1000
    assert Path(f"/proc/{process.pid}/comm").read_bytes().strip() == expected[:15].strip()
    # The environment follows the arguments in memory, and must not change.
    environ = Path(f"/proc/{process.pid}/environ").read_bytes()
    assert environ.split(b"\0")[0].decode() in {f"{name}={value}" for name, value in os.environ.items()}
    process.kill()
    await process.communicate()


PARENT = """
import os, sys
from gpumesh.tunnels.local_system.child_process import die_with_parent
pid = os.fork()
if pid == 0:
    die_with_parent()
    print(os.getpid(), flush=True)
    while True:
        os.pipe()  # it never reads anything: it cannot notice by itself
        import time; time.sleep(1)
os.waitpid(pid, 0)
"""


async def test_a_process_dies_with_its_parent() -> None:
    parent = await start(PARENT)
    child = int(await line_of(parent))
    assert alive(child)
    os.kill(child, signal.SIGSTOP)  # a stopped process cannot notice either
    parent.kill()
    try:
        await wait_until(lambda: not alive(child), "the child's end")
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)
        await parent.communicate()


LATE = """
import os, sys
from gpumesh.tunnels.local_system.child_process import die_with_parent
parent = os.getpid()
if os.fork() == 0:
    sys.stdin.read()  # until the parent has ended
    die_with_parent(parent)
    print("it lives", flush=True)
"""


async def test_a_parent_that_ended_before_is_noticed() -> None:
    parent = await start(LATE)
    await wait_until(lambda: not alive(parent.pid), "the parent's end")
    out, _ = await asyncio.wait_for(parent.communicate(b""), 30)
    assert out == b""
