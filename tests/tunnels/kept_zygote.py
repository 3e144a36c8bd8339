"""A zygote that the pools of a module's tests use one after the other: each that starts takes a fifth of a second of
CPU to import what a worker needs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from types import TracebackType

from gpumesh.text.lines import LineBuffer
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.tunnels.polling import children

_OF_A_TEST = ("PYTEST_CURRENT_TEST", "XDG_RUNTIME_DIR")


class KeptZygote:
    """``process`` and ``control`` are of a zygote that no pool uses now; ``None`` if there is none. Its workers have
    the environment that it was started with."""

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None
        self.request_count = 0  # no two pools give the same number to a request

    def end(self) -> None:
        """Ends the zygote and its workers. The next pool starts another."""
        process, control = self.process, self.control
        self.process = self.control = None
        if process is not None and control is not None:
            control.close()  # the zygote ends its workers, and then itself
            process.wait(20)


class LastingPool(WorkerPool):
    """Takes the kept zygote when it needs one, and gives its own back at its end, unless that has ended."""

    def __init__(self, kept: KeptZygote) -> None:
        super().__init__()
        self._kept = kept

    def _start_zygote(self) -> None:
        kept = self._kept
        if kept.process is None or kept.process.poll() is not None or kept.environment != _environment():
            kept.end()
            kept.environment = _environment()
            super()._start_zygote()
            return
        self._process, self._control = self._kept.process, self._kept.control
        self._kept.process = self._kept.control = None
        self._answer_lines = LineBuffer()
        assert self._control is not None
        asyncio.get_running_loop().add_reader(self._control, self._receive_answers, self._control)

    async def __aenter__(self) -> LastingPool:
        self._request_count = self._kept.request_count
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.request_count = self._request_count
        process, control = self._process, self._control
        if process is None or control is None or kind is not None or not await _is_idle(process):
            await self._stop_zygote()
            return
        self._process = self._control = None
        asyncio.get_running_loop().remove_reader(control)
        self._fail_pending_forks("its pool has ended")
        with contextlib.suppress(BlockingIOError):
            while control.recv(65536):
                pass  # answers that no call waits for any more
        self._kept.process, self._kept.control = process, control


def _environment() -> dict[str, str]:
    """All but what differs from test to test and is nothing to a worker: the mesh makes its sockets."""
    return {name: value for name, value in os.environ.items() if name not in _OF_A_TEST}


async def _is_idle(zygote: subprocess.Popen[bytes]) -> bool:
    """Whether it runs, and its workers have ended, for which they have a moment."""
    for _ in range(200):
        if zygote.poll() is not None:
            return False
        if not children(zygote.pid):
            return True
        await asyncio.sleep(0.01)
    return False
