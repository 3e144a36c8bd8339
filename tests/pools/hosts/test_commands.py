"""The command lines of a pool's programs: from a plan, and as a real shell starts them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.errors import PoolFailed, PoolProgramMissing
from gpumesh.pools.base import MemberPlan, SpeedForecast
from gpumesh.pools.hosts.commands import confirm_cache_argv, llama_server_argv, rpc_server_argv
from gpumesh.pools.hosts.guarded_program import run_guarded
from gpumesh.pools.hosts.programs import HostPrograms
from tests.pools.hosts.head_logs import MIB, WORKERS, cuda, head_programs, make_plan, share
from tests.pools.hosts.local_route import local_route


def options(argv: tuple[str, ...], program: str) -> str:
    """The options of the program at the end of a command."""
    return " ".join(argv[argv.index(program) + 1 :])


def test_the_heads_layers_are_the_last_ones_and_the_workers_come_before() -> None:
    argv = llama_server_argv(
        make_plan(), head_programs(), model_path="/models/big.gguf", workers=WORKERS[::-1], port=21080, alias="big"
    )
    assert argv[:2] == ("sh", "-c")
    assert options(argv, "/opt/llama/llama-server") == (
        "-m /models/big.gguf --host 127.0.0.1 --port 21080 --alias big -c 16384 -np 4 -ctk f16 -ctv f16 -fit off"
        " -sm layer -ngl 9 --rpc 127.0.0.1:21001,127.0.0.1:21002 --device RPC0,RPC1,CUDA0 -ts 3,1,5"
        " --kv-unified --override-kv llama.context_length=int:4096 --cache-ram 0"
        " --ctx-checkpoints 0 --metrics --slots --offline -lv 4"
    )


def test_a_stream_ends_at_the_pools_context_if_the_model_can_be_told_so() -> None:
    def given(**changes: object) -> str:
        plan = make_plan(**changes)
        argv = llama_server_argv(plan, head_programs(), model_path="m", workers=WORKERS, port=1, alias="big")
        return options(argv, "/opt/llama/llama-server")

    shape = make_plan().shape
    assert "--override-kv llama.context_length=int:131072 " in given(context=200_000), "as llama-server would do"
    assert "--override-kv" not in given(parallel=1), "the whole cache is that of the one stream"
    assert "--override-kv" not in given(shape=replace(shape, learned_positions=True)), "it could not be loaded"


def test_a_head_without_a_gpu_keeps_the_first_layers_by_ngl() -> None:
    plan = make_plan(
        members=(
            MemberPlan("iceland", True, (share(0, 4, index=None),)),
            MemberPlan("cellar", False, (share(4, 2, index=0), share(6, 3, index=1))),
            MemberPlan("attic", False, ()),
        )
    )
    argv = llama_server_argv(
        plan, head_programs(), model_path="m", workers=WORKERS[:1], port=1, alias="big", draft_path="/models/small.gguf"
    )
    text = options(argv, "/opt/llama/llama-server")
    assert " -ngl 5 --rpc 127.0.0.1:21001 --device RPC0,RPC1 -ts 2,3 " in text
    assert " -md /models/small.gguf --spec-type draft-simple -devd none -ngld 0 " in text
    assert " -t 16 " in text, "as many threads as the host has cores"


def test_tokens_are_proposed_without_a_model() -> None:
    argv = llama_server_argv(
        make_plan(), head_programs(), model_path="m", workers=WORKERS, port=1, alias="big", drafts_by_ngram=True
    )
    text = " ".join(argv)
    assert " --spec-type ngram-simple --spec-ngram-simple-size-m 16 " in text
    assert " -md " not in text


def test_a_draft_model_is_on_the_heads_gpu() -> None:
    speed = SpeedForecast(14.0, 4, 40.0, 20.0, 50.0, draft_length=8)
    argv = llama_server_argv(
        make_plan(speed=speed), head_programs(), model_path="m", workers=WORKERS, port=1, alias="big", draft_path="d"
    )
    text = options(argv, "/opt/llama/llama-server")
    assert " -md d --spec-type draft-simple -devd CUDA0 -ngld 99 --spec-draft-n-max 8 " in text
    other_gpu = replace(share(0, 0, index=1), draft_bytes=MIB)
    members = (MemberPlan("iceland", True, (share(4, 5), other_gpu)), *make_plan().members[1:])
    programs = replace(head_programs(), devices=(cuda(0), cuda(1)))
    argv = llama_server_argv(
        make_plan(members=members), programs, model_path="m", workers=WORKERS, port=1, alias="big", draft_path="d"
    )
    assert " -devd CUDA1 -ngld 99 " in options(argv, "/opt/llama/llama-server")


def test_a_worker_offers_the_devices_of_the_plan_in_the_plans_order() -> None:
    programs = HostPrograms("cellar", rpc_server="/opt/rpc", rpc_folder="/opt", devices=(cuda(0), cuda(1)), cores=8)
    member = MemberPlan("cellar", False, (share(6, 3, index=0), share(4, 2, index=1)))
    argv = rpc_server_argv(member, programs, 21001)
    assert options(argv, "/opt/rpc") == "-H 127.0.0.1 -p 21001 -d CUDA1,CUDA0"
    member = MemberPlan("cellar", False, (share(4, 2, index=None),))
    assert options(rpc_server_argv(member, programs, 21001), "/opt/rpc") == "-H 127.0.0.1 -p 21001 -d CPU -t 8"


def test_a_gpu_that_llama_cpp_does_not_see() -> None:
    programs = HostPrograms("cellar", rpc_server="/opt/rpc", devices=(replace(cuda(0), name="CPU"),))
    with pytest.raises(PoolFailed) as failed:
        rpc_server_argv(MemberPlan("cellar", False, (share(0, 3),)), programs, 21001)
    assert failed.value.message == "llama.cpp on cellar does not see GPU 0, NVIDIA GeForce RTX 4090: it lists CPU"
    with pytest.raises(PoolProgramMissing):
        rpc_server_argv(MemberPlan("cellar", False, (share(0, 3),)), replace(programs, rpc_server=None), 21001)


SHOW = """#!/bin/sh
echo "$LD_LIBRARY_PATH|$CUDA_DEVICE_ORDER|$LLAMA_ARG_HOST$LLAMA_API_KEY|$LLAMA_CACHE|$*"
"""


async def run_worker(tmp_path: Path, *, weights_mib: int = 1) -> str:
    """The line that a program prints in the place of ggml-rpc-server."""
    program = tmp_path / "rpc"
    program.write_text(SHOW)
    program.chmod(0o755)
    programs = HostPrograms("cellar", rpc_server=str(program), rpc_folder=str(tmp_path), devices=(cuda(0),))
    member = MemberPlan("cellar", False, (replace(share(0, 3), weights_bytes=weights_mib * MIB),))
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "LLAMA_ARG_HOST": "0.0.0.0", "LLAMA_API_KEY": "secret",
        "LD_LIBRARY_PATH": "/usr/nvidia"
    }  # fmt: skip
    async with local_route(environment=environment) as route:
        async with run_guarded(route, rpc_server_argv(member, programs, 21001)) as worker:
            lines = [line async for line in worker.lines()]
        assert worker.end is not None
        assert worker.end.exit_status == 0
    return lines[-1]


async def confirm(tmp_path: Path) -> None:
    async with local_route(environment={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}) as route:
        await route.exec(confirm_cache_argv(21001), timeout_s=20)


async def test_a_program_gets_the_environment_that_it_needs(tmp_path: Path) -> None:
    cache = tmp_path / ".cache/gpumesh/llama.cpp"
    line = await run_worker(tmp_path)
    assert line == f"{tmp_path}:/usr/nvidia|PCI_BUS_ID||{cache}|-H 127.0.0.1 -p 21001 -d CUDA0 -c"
    assert (cache / "rpc").is_dir()


async def test_after_a_load_that_did_not_end_the_newest_cached_tensor_is_not_trusted(tmp_path: Path) -> None:
    cache = tmp_path / ".cache/gpumesh/llama.cpp/rpc"
    await run_worker(tmp_path)
    for age, name in enumerate(("newest", "middle", "oldest")):
        (cache / name).write_bytes(b"a tensor")
        os.utime(cache / name, (1e9 - age, 1e9 - age))
    await confirm(tmp_path)  # the model was loaded
    await run_worker(tmp_path)
    assert {path.name for path in cache.iterdir()} == {"newest", "middle", "oldest"}
    await run_worker(tmp_path)  # the load before it was not confirmed
    assert {path.name for path in cache.iterdir()} == {"middle", "oldest"}


async def test_a_load_of_another_worker_that_still_runs_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / ".cache/gpumesh/llama.cpp"
    (folder / "rpc").mkdir(parents=True)
    (folder / "rpc/tensor").write_bytes(b"a tensor")
    program = tmp_path / "ggml-rpc-server"
    sleep = shutil.which("sleep")
    assert sleep is not None
    shutil.copy(sleep, program)
    with subprocess.Popen([program, "600"]) as other:
        (folder / "unfinished-21002").write_text(f"{other.pid}\n")
        await run_worker(tmp_path)
        assert (folder / "rpc/tensor").exists()
        other.kill()
    await confirm(tmp_path)
    await run_worker(tmp_path)
    assert not (folder / "rpc/tensor").exists()
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["unfinished-21001"]


async def test_without_room_on_the_disk_there_is_no_cache(tmp_path: Path) -> None:
    line = await run_worker(tmp_path, weights_mib=1 << 40)
    assert line.endswith("-d CUDA0")
