"""What hosts offer: GPUs by nvidia-smi and llama.cpp, a CPU only with ``memory``."""

from __future__ import annotations

from gpumesh.pool_spec import PoolMember
from gpumesh.pools.hosts.offers import host_offer
from gpumesh.pools.hosts.programs import HostPrograms, ProgramDevice
from gpumesh.probes.nvidia_smi import GpuReport
from gpumesh.state import GpuState, LoadedModel, ProcessState
from tests.pools.hosts.head_logs import GPU, MIB, cuda

CPU = ProgramDevice("CPU", "AMD EPYC", 64000 * MIB, 60000 * MIB)


def gpu(index: int = 0, free_mib: int | None = 20000, *, ollama_mib: int | None = None) -> GpuState:
    processes: tuple[ProcessState, ...] = (ProcessState(7, "python", 1000),)
    if ollama_mib is not None:
        processes += (ProcessState(8, "/usr/local/bin/ollama", ollama_mib),)
    return GpuState(index, f"GPU-{index}", GPU, 24564, 4564, free_mib, processes=processes)


def test_a_gpu_offers_its_free_memory_and_what_ollama_holds() -> None:
    programs = HostPrograms("iceland", devices=(cuda(0),))
    report = GpuReport((gpu(ollama_mib=3000),))
    offer = host_offer(report, PoolMember("iceland", 16384), programs, find_bandwidth={GPU: 1e12}.get)
    (device,) = offer.devices
    assert (device.index, device.free_bytes, device.held_by_others) == (0, 20000 * MIB, 3000 * MIB)
    assert device.bytes_per_s == 1e12
    assert offer.limit_bytes == 16384 * MIB
    assert offer.problem is None


def test_where_nvidia_smi_shows_no_process_ollamas_own_figures_count() -> None:
    loaded = (LoadedModel("qwen2.5:7b", size_vram_mib=4000), LoadedModel("llama3.2:1b", size_vram_mib=900))
    programs = HostPrograms("iceland", devices=(cuda(0),))
    offer = host_offer(GpuReport((gpu(),)), PoolMember("iceland"), programs, loaded=loaded)
    assert offer.devices[0].held_by_others == 4564 * MIB, "not more than is used"
    offer = host_offer(GpuReport((gpu(1), gpu(0))), PoolMember("iceland"), HostPrograms("iceland"), loaded=loaded)
    assert [(device.index, device.held_by_others) for device in offer.devices] == [(0, 0), (1, 0)]


def test_a_gpu_that_llama_cpp_does_not_see_is_a_problem() -> None:
    offer = host_offer(GpuReport((gpu(),)), PoolMember("iceland"), HostPrograms("iceland", devices=(CPU,)))
    assert offer.problem == "it has a GPU by nvidia-smi, but llama.cpp there sees only: CPU"


def test_a_host_without_a_gpu_computes_on_its_cpu_only_with_memory() -> None:
    programs = HostPrograms("iceland", devices=(CPU,), memory_total_bytes=64000 * MIB, memory_free_bytes=6000 * MIB)
    report = GpuReport(error="nvidia-smi is missing")
    offer = host_offer(report, PoolMember("iceland", 8192), programs, find_bandwidth={"CPU": 4e10}.get)
    (device,) = offer.devices
    assert (device.name, device.index, device.free_bytes) == ("CPU", None, 6000 * MIB)
    assert device.bytes_per_s == 4e10
    for report in (GpuReport(), GpuReport(error="nvidia-smi is missing")):
        offer = host_offer(report, PoolMember("iceland"), programs)
        assert offer.problem is not None
        assert offer.hint is not None
        assert "memory" in offer.hint


def test_free_memory_that_is_not_told() -> None:
    offer = host_offer(GpuReport((gpu(free_mib=None),)), PoolMember("iceland"), HostPrograms("iceland"))
    assert offer.devices[0].free_bytes == 20000 * MIB
