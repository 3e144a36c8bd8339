"""Finding llama.cpp on a host, by real shells; the programs are scripts that print what llama.cpp prints."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.errors import PoolProgramMissing, PoolVersionsDiffer
from gpumesh.pools.hosts.ports import FIRST_PORT, LAST_PORT, choose_free_ports
from gpumesh.pools.hosts.programs import HostPrograms, ProgramDevice, check_versions, find_programs, read_programs
from tests.pools.hosts.local_route import LocalRoute, local_route
from tests.tunnels.sshd import listener

GIB = 1 << 30
SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]
# What the programs of build 10434 print, with a GPU as a CUDA build lists it.
RPC_SERVER = """#!/bin/sh
[ "$*" = "-H 192.0.2.1 -p 50052" ] || exit 9
echo "ggml_cuda_init: found 1 CUDA devices:" >&2
echo "WARNING: Host ('192.0.2.1') is != '127.0.0.1'" >&2
echo "Starting RPC server v5.0.0"
echo "  endpoint       : 192.0.2.1:50052"
echo "  local cache    : n/a"
echo "Devices:"
echo "  CUDA0: NVIDIA GeForce RTX 4090 (24564 MiB, 24100 MiB free)"
echo "  transport      : TCP"
echo "libraries in $LD_LIBRARY_PATH, $CUDA_DEVICE_ORDER" >&2
echo "Failed to create server socket" >&2
"""
LLAMA_SERVER = """#!/bin/sh
case $1 in
--version) echo "version: 10434 (7e4c0a9)" >&2; echo "built with GNU 11.4.0 for Linux x86_64" >&2;;
--list-devices) echo "Available devices:"; echo "  CUDA0: NVIDIA GeForce RTX 4090 (24564 MiB, 24100 MiB free)";;
esac
"""


def install(folder: Path, **programs: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(text)
        path.chmod(0o755)
    return folder


@pytest.fixture(params=SHELLS)
async def host(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LocalRoute]:
    """A host whose home folder is empty."""
    shell = shutil.which(request.param)
    assert shell is not None
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    async with local_route((shell, "sh") if request.param == "busybox" else (shell,), environment) as route:
        yield route


async def test_programs_in_the_home_folder_are_found(host: LocalRoute, tmp_path: Path) -> None:
    folder = install(tmp_path / "llama.cpp/build/bin", ggml_rpc_server=RPC_SERVER, llama_server=LLAMA_SERVER)
    with listener() as listening:
        port = listening.getsockname()[1]
        programs = await find_programs(host, "iceland")
    assert programs.server == programs.need_server() == f"{folder}/llama-server"
    assert programs.rpc_server == programs.need_rpc_server() == f"{folder}/ggml-rpc-server"
    assert programs.server_folder == programs.rpc_folder == str(folder)
    assert programs.build == "10434 (7e4c0a9)"
    assert programs.rpc == (5, 0, 0)
    (gpu,) = programs.gpus
    assert (gpu.name, gpu.description, gpu.free_bytes) == ("CUDA0", "NVIDIA GeForce RTX 4090", 24100 << 20)
    assert programs.home == str(tmp_path)
    assert programs.cores is not None
    assert programs.memory_free_bytes is not None
    assert programs.memory_free_bytes > 1 << 20
    assert port in programs.used_ports


async def test_the_folder_of_mesh_yaml_counts_alone(host: LocalRoute, tmp_path: Path) -> None:
    install(tmp_path / "llama.cpp", ggml_rpc_server=RPC_SERVER, llama_server=LLAMA_SERVER)
    other = install(tmp_path / "my build's/bin", llama_server=LLAMA_SERVER)
    programs = await find_programs(host, "iceland", llama_cpp_dir="~/my build's")
    assert programs.server == f"{other}/llama-server"
    assert programs.devices, "llama-server lists them where there is no ggml-rpc-server"
    with pytest.raises(PoolProgramMissing) as missing:
        programs.need_rpc_server()
    assert missing.value.message == "there is no ggml-rpc-server on iceland (looked in ~/my build's)"
    assert missing.value.hint is not None
    assert "cmake" in missing.value.hint


async def test_a_link_on_path_leads_to_the_folder_of_the_libraries(host: LocalRoute, tmp_path: Path) -> None:
    folder = install(tmp_path / "release b10434", ggml_rpc_server=RPC_SERVER)
    links = tmp_path / "links"
    links.mkdir()
    (links / "rpc-server").symlink_to(folder / "ggml-rpc-server")  # the name of older builds
    host.environment["PATH"] = f"{links}:{host.environment['PATH']}"
    programs = await find_programs(host, "iceland")
    assert programs.rpc_server == f"{links}/rpc-server"
    assert programs.rpc_folder == str(folder)


async def test_a_host_without_llama_cpp(host: LocalRoute) -> None:
    programs = await find_programs(host, "iceland")
    assert (programs.server, programs.rpc_server, programs.devices) == (None, None, ())
    with pytest.raises(PoolProgramMissing, match="there is no llama-server on iceland"):
        programs.need_server()


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_any_output_is_read(head: bytes, tail: bytes) -> None:
    read_programs(head, "iceland")
    read_programs(b"@gpumesh@ server /opt/llama\n" + head + b"\n@gpumesh@ rpc " + tail + b"\n@gpumesh@ end", "iceland")


def test_what_a_host_prints_is_bounded_and_printable() -> None:
    output = (
        "@gpumesh@ rpc /opt/\x1b]0;x\x07/rpc-server\n/opt\n  CUDA0: a\x1b[31mGPU (99999999 MiB, 1 MiB free)\n"
        "  CUDA1: a\x1b[31mGPU (10 MiB, 1 MiB free)\nversion: \x1b[31m1\n@gpumesh@ end"
    )
    programs = read_programs(output.encode(), "iceland")
    assert programs is not None
    assert programs.rpc_server is None
    good = output.replace("/opt/\x1b]0;x\x07/rpc-server", "/opt/rpc-server")
    programs = read_programs(good.encode(), "iceland")
    assert programs is not None
    assert [device.description for device in programs.devices] == ["aGPU"]


def test_a_gpu_that_is_listed_twice_counts_once() -> None:
    names = ("BLAS", "CUDA0", "CUDA1", "Vulkan0", "Vulkan1", "CPU")
    devices = tuple(ProgramDevice(name, "a GPU", 0 if name == "BLAS" else GIB, 0) for name in names)
    assert [device.name for device in HostPrograms("iceland", devices=devices).gpus] == ["CUDA0", "CUDA1"]


def test_a_gpu_that_nvidia_smi_does_not_know_is_left_out() -> None:
    names = {"Vulkan0": "Intel(R) UHD Graphics 770", "Vulkan1": "NVIDIA GeForce RTX 4090"}
    devices = tuple(ProgramDevice(name, description, GIB, 0) for name, description in names.items())
    assert [device.name for device in HostPrograms("iceland", devices=devices).gpus] == ["Vulkan1"]
    tesla = (ProgramDevice("CUDA0", "Tesla T4", GIB, 0),)
    assert HostPrograms("iceland", devices=tesla).gpus == tesla


def test_versions_are_compared_by_protocol_and_else_by_build() -> None:
    base = HostPrograms("iceland", build="10434 (7e4c0a9)", rpc=(5, 0, 0))
    for other in (
        replace(base, build="10500 (aaaaaaa)"),  # the same protocol
        replace(base, rpc=None),
        replace(base, build=None, rpc=None),  # llama-server will tell
    ):
        check_versions({"iceland": base, "cellar": replace(other, node="cellar")}, "iceland")
    for other in (replace(base, rpc=(5, 0, 1)), replace(base, build="10500 (aaaaaaa)", rpc=None)):
        with pytest.raises(PoolVersionsDiffer) as differ:
            check_versions({"iceland": base, "cellar": replace(other, node="cellar")}, "iceland")
        assert (
            "iceland has llama.cpp 10434 (7e4c0a9), RPC protocol 5.0.0; cellar has llama.cpp 1" in differ.value.message
        )


def test_free_ports_are_not_in_use() -> None:
    used = set(range(FIRST_PORT, LAST_PORT - 3))
    assert sorted(choose_free_ports(used, 3, random.Random(1))) == [LAST_PORT - 3, LAST_PORT - 2, LAST_PORT - 1]
