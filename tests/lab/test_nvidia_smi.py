"""Shapes of facts/nvidia-smi.md; that gpumesh's own probe reads them is test_shell's."""

import pytest

from gpumesh.lab import nvidia_smi, profile
from gpumesh.lab.inference.usage import GpuLoad
from gpumesh.lab.profile import HostProfile, SmiMode

ONE = profile.make_host("one")
TWO = profile.make_host("two", gpus=2)
IDLE = GpuLoad()
BUSY = GpuLoad(busy=1.0, heat=1.0, models=(("qwen2.5:7b", 5280),))


def ask(*argv: str, host: HostProfile = ONE, load: GpuLoad = IDLE, mode: SmiMode = SmiMode.OK) -> tuple[int, str]:
    status, output = nvidia_smi.run_nvidia_smi(argv, host, load, mode)
    return status, output.decode(errors="replace")


def query(fields: str, **more: object) -> list[list[str]]:
    status, output = ask(f"--query-gpu={fields}", "--format=csv,noheader,nounits", **more)  # type: ignore[arg-type]
    assert status == 0
    return [line.split(", ") for line in output.splitlines()]


def test_an_idle_4090() -> None:
    fields = "index,name,memory.total,memory.used,memory.free,utilization.gpu,power.limit,pstate"
    assert query(fields) == [["0", "NVIDIA GeForce RTX 4090", "24564", "4", "24188", "0", "450.00", "P8"]]


def test_a_busy_one_holds_the_model_draws_power_and_lists_its_process() -> None:
    ((used, busy, power, pstate),) = query("memory.used,utilization.gpu,power.draw,pstate", load=BUSY)
    assert (used, busy, pstate) == ("5284", "97", "P2")
    assert 300 < float(power) <= 450
    status, output = ask("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits", load=BUSY)
    assert (status, output) == (0, "4000, 5280\n")


def test_models_spread_over_the_gpus_and_one_gpu_can_be_asked_for() -> None:
    load = GpuLoad(models=(("a", 5000), ("b", 6000)))
    assert query("memory.used", host=TWO, load=load) == [["5004"], ["6004"]]
    status, output = ask(f"--id={TWO.gpus[1].uuid}", "--query-gpu=index", "--format=csv,noheader", host=TWO)
    assert (status, output) == (0, "1\n")
    assert ask("-i", "7", "--query-gpu=index", "--format=csv,noheader", host=TWO)[0] == 6


def test_units_and_header_stand_there_unless_left_out() -> None:
    _, output = ask("--query-gpu=memory.total,uuid", "--format=csv")
    assert output == f"memory.total [MiB], uuid\n24564 MiB, {ONE.gpus[0].uuid}\n"


@pytest.mark.parametrize(
    ("mode", "status", "words"),
    [
        (SmiMode.MISSING, 127, "not found"),
        (SmiMode.NO_DRIVER, 9, "couldn't communicate with the NVIDIA driver"),
        (SmiMode.DRIVER_MISMATCH, 18, "Driver/library version mismatch"),
        (SmiMode.NVML_UNKNOWN, 255, "Failed to initialize NVML: Unknown Error"),
        (SmiMode.NO_DEVICES, 6, "No devices were found"),
        (SmiMode.GPU_LOST, 15, "GPU is lost."),
    ],
)
def test_failures_in_the_real_tools_words(mode: SmiMode, status: int, words: str) -> None:
    code, output = ask("--query-gpu=index", "--format=csv,noheader", mode=mode)
    assert code == status
    assert words in output


def test_a_lost_gpu_spoils_the_call_for_all_but_not_for_the_other_alone() -> None:
    assert ask("--query-gpu=index", "--format=csv,noheader", host=TWO, mode=SmiMode.GPU_LOST)[0] == 15
    assert ask("-i", "1", "--query-gpu=index", "--format=csv,noheader", host=TWO, mode=SmiMode.GPU_LOST) == (0, "1\n")


def test_an_old_driver_refuses_the_whole_call_for_one_new_field() -> None:
    status, output = ask("--query-gpu=index,utilization.memory", "--format=csv", mode=SmiMode.OLD)
    assert status == 2
    assert output.startswith('Field "utilization.memory" is not a valid field to query.')
    assert ask("--query-gpu=index,strange", "--format=csv")[0] == 2


def test_unknown_values_are_spelled_in_all_ways() -> None:
    ((index, *rest),) = query("index,memory.total,memory.used,utilization.gpu", mode=SmiMode.UNKNOWN_VALUES)
    assert index == "0"
    assert not any(value.isdigit() for value in rest)


def test_the_plain_table_says_that_it_is_a_simulation() -> None:
    status, output = ask(load=BUSY)
    assert status == 0
    assert "SIMULATED" in output
    assert "5284MiB / 24564MiB" in output
