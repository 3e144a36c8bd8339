"""The scripts start under each login shell: sshd gives it the whole command as one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gpumesh.errors import PoolModelMissing
from gpumesh.pools.hosts.commands import confirm_cache_argv, llama_server_argv, rpc_server_argv
from gpumesh.pools.hosts.guarded_program import run_guarded
from gpumesh.pools.hosts.model_files import find_ollama_blob, read_model
from gpumesh.pools.hosts.paths import measure_through_us
from gpumesh.pools.hosts.programs import HostPrograms, find_programs
from gpumesh.pools.hosts.worker_login import WorkerLogin, may_log_in
from gpumesh.pools.hosts.worker_traffic import read_received_bytes
from tests.pools.hosts.head_logs import WORKERS, cuda, make_plan
from tests.pools.hosts.local_route import LocalRoute, local_route
from tests.prerequisites import needs

pytestmark = needs("ssh")
SHELLS = [shell for shell in ("sh", "tcsh", "fish", "zsh") if shutil.which(shell)]


@pytest.mark.parametrize("shell", SHELLS)
async def test_each_script_starts(shell: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    async with local_route(environment=environment, login_shell=shutil.which(shell)) as route:
        assert (await find_programs(route, "iceland")).home == str(tmp_path)
        with pytest.raises(PoolModelMissing, match="there is no file"):
            await read_model(route, "~/it's.gguf", node="iceland")
        with pytest.raises(PoolModelMissing, match="does not have the model"):
            await find_ollama_blob(route, "gpumesh-test:none", node="iceland")
        assert (await measure_through_us(route, route)).rtt_ms is not None
        assert await read_received_bytes(route, 1) is None
        assert (await route.exec(confirm_cache_argv(21001), timeout_s=20)).exit_status == 0
        reason = await may_log_in(route, WorkerLogin("cellar", "me", "127.0.0.1", 1, ("ssh-ed25519 AAAA",)))
        assert reason is not None
        assert "Connection refused" in reason
        await check_programs(route, tmp_path)


async def check_programs(route: LocalRoute, folder: Path) -> None:
    """Starts a program in the place of each of llama.cpp's."""
    program = folder / "it's a program"
    program.write_text('#!/bin/sh\necho "$1 $CUDA_DEVICE_ORDER"; exit 5\n')
    program.chmod(0o755)
    plan, devices = make_plan(), (cuda(0),)
    programs = HostPrograms("iceland", server=str(program), rpc_server=str(program), devices=devices)
    worker = rpc_server_argv(plan.workers[0], programs, 21001)
    head = llama_server_argv(plan, programs, model_path="m", workers=WORKERS, port=1, alias="a")
    for argv, option in ((worker, "-H"), (head, "-m")):
        async with run_guarded(route, argv) as running:
            lines = [line async for line in running.lines()]
        assert lines == [f"{option} PCI_BUS_ID"]
        assert running.end is not None
        assert running.end.exit_status == 5
