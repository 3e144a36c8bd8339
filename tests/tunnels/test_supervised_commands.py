"""Commands through a supervised tunnel, over both transports, against a real OpenSSH sshd."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from gpumesh.errors import ExecError
from gpumesh.topology import TransportKind
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import Sshd
from tests.tunnels.supervised import (
    LONG_S,
    both,
    supervised,
    wait_reconnects,
)

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


@both
async def test_streamed_output_comes_while_the_command_runs(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport), 1) as watched:
        await watched.tunnel.wait_up()
        pid = 0
        async with contextlib.aclosing(watched.tunnel.exec_stream(["sh", "-c", "echo $$; sleep 600"])) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.stream is OutputStream.STDOUT:
                    pid = int(chunk.data)
                    break
            assert alive(pid)
        await wait_until(lambda: not alive(pid), "the command's end, after the iterator is closed")
        chunks_of_all = [
            chunk
            async for chunk in watched.tunnel.exec_stream(["sh", "-c", "echo a; exit 4"])
            if chunk.stream is OutputStream.STDOUT
        ]
        assert b"".join(chunk.data for chunk in chunks_of_all) == b"a\n"
        assert [(chunk.ended, chunk.exit_status) for chunk in chunks_of_all][-1] == (True, 4)


@both
async def test_a_command_that_times_out_or_loses_its_connection(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), 1) as watched:
        await watched.tunnel.wait_up()
        with pytest.raises(ExecError, match=r"within 0\.2 s"):
            await watched.tunnel.exec(["sleep", "600"], timeout_s=0.2)
        cut = asyncio.create_task(watched.tunnel.exec(["sh", "-c", "echo started >&2; sleep 600"], timeout_s=60))
        later_result = await watched.tunnel.exec(["true"], timeout_s=20)  # by now the other command has been sent
        assert later_result.exit_status == 0
        sshd.kill_sessions()
        with pytest.raises(ExecError, match="iceland"):
            await cut
        await wait_reconnects(watched, 1)
        truncated = await watched.tunnel.exec(["head", "-c", "100000", "/dev/zero"], timeout_s=20, limit_bytes=1000)
        assert (len(truncated.stdout), truncated.truncated) == (1000, True)
