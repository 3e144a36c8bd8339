from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from gpumesh.daemon.process import async_runner


@pytest.mark.parametrize("fast", [True, False])
def test_run_gives_the_result_or_raises_the_error(fast: bool) -> None:
    async def good() -> int:
        await asyncio.sleep(0)
        return 5

    async def bad() -> None:
        raise ValueError("inside")

    assert async_runner.run(good(), use_uvloop=fast) == 5
    with pytest.raises(ValueError, match="inside"):
        async_runner.run(bad(), use_uvloop=fast)


@pytest.mark.parametrize("fast", [True, False])
def test_ctrl_c_cancels_and_then_interrupts(fast: bool) -> None:
    ended = []

    async def main() -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        async_runner.run(main(), use_uvloop=fast)
    assert ended == [True]


@pytest.mark.parametrize(("fast", "threads"), [(True, 0), (False, 0), (True, 1), (False, 1)])
def test_ctrl_c_while_the_loop_is_being_made_prints_nothing(fast: bool, threads: int) -> None:
    """At each line of asyncio that runs before the command's own first line, one after the other. A further thread, as
    that of a progress bar, may take the signal."""
    script = f"""
import os, signal, sys, threading
for _ in range({threads}):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
from gpumesh.daemon.process import async_runner

begun = False

async def main():
    global begun
    begun = True

def interrupted(nth):
    global begun
    begun = False
    count = 0
    def trace(frame, event, arg):
        nonlocal count
        if "/asyncio/" in frame.f_code.co_filename and not begun:
            count += 1
            if count == nth:
                sys.settrace(None)
                os.kill(os.getpid(), signal.SIGINT)
        return trace
    coroutine = main()
    sys.settrace(trace)
    try:
        async_runner.run(coroutine, use_uvloop={fast})
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
        coroutine.close()

nth = 1
while interrupted(nth):
    nth += 1
print(nth)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.stderr == ""
    assert int(done.stdout) > 20
