"""The times of processes and of the machine, and what is made of them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest

from gpumesh.bench.load.limits.burst_wait import median_wait_ms, time_per_piece_s
from gpumesh.bench.load.limits.load_meter import LoadMeter, interpolate, share_in_windows
from gpumesh.bench.load.limits.system_load import MainThread, read_machine_times, read_process_times


def test_values_between_samples() -> None:
    at_s, values = [1.0, 2.0, 4.0], [0.0, 1.0, 2.0]
    moments = (0.0, 1.0, 1.5, 3.0, 4.0, 9.0)
    assert [interpolate(at_s, values, moment) for moment in moments] == [0.0, 0.0, 0.5, 1.5, 2.0, 2.0]


def test_the_share_of_windows_is_their_median() -> None:
    at_s, run_s = [0.0, 1.0, 2.0, 3.0], [0.0, 0.1, 1.1, 1.1]
    windows = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]  # a tenth, all, nothing
    assert share_in_windows(at_s, run_s, windows) == pytest.approx(0.1)
    assert share_in_windows(at_s, run_s, [(1.0, 1.0)]) is None, "no time has passed"
    assert share_in_windows([], [], windows) is None


def test_the_wait_in_a_burst_is_half_of_the_work_on_requests() -> None:
    """64 requests of 0.2 ms each are sent at once. While they wait for their first token, 10 pieces come."""
    windows = [(0.0, 0.06)] * 64
    wait_ms = median_wait_ms(windows, [0.01] * 10 + [0.5], lambda _begin, _end: 0.0128 + 10 * 25e-6, 25e-6)
    assert wait_ms == pytest.approx(6.4)
    # In a steady flow all the work is that of tokens.
    assert median_wait_ms(windows, [0.01] * 400, lambda _begin, _end: 0.01, 25e-6) == 0.0
    assert median_wait_ms([], [], lambda _begin, _end: 1.0, 1.0) is None


def test_a_request_costs_as_much_as_some_pieces() -> None:
    assert time_per_piece_s(1.0, requests=100, pieces=400) == pytest.approx(0.001)
    assert time_per_piece_s(1.0, requests=0, pieces=0) == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_the_times_that_linux_gives() -> None:
    machine = read_machine_times()
    assert machine is not None
    assert 0 < machine.busy_s < machine.total_s
    thread = MainThread(os.getpid())
    before = thread.read()
    until = time.process_time() + 0.02
    while time.process_time() < until:
        pass
    after = thread.read()
    thread.close()
    assert before is not None
    assert after is not None
    assert after.run_s - before.run_s == pytest.approx(0.02, abs=0.02)
    assert after.run_s > before.run_s
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        ours = read_process_times(os.getpid())
        assert {os.getpid(), child.pid} <= ours.keys()
        assert child.pid not in read_process_times(2**22 + 1), "nobody's descendant"
        assert list(read_process_times(child.pid)) == [child.pid]
        child.communicate(b"\n")
    gone = MainThread(child.pid)
    assert gone.read() is None
    gone.close()


async def test_a_stage_is_measured() -> None:
    meter = LoadMeter(os.getpid())
    async with meter.measure():
        await asyncio.sleep(0.05)
    assert meter.duration_s >= 0.05
    assert len(meter.lags_ms) >= 1
    windows = [(meter.started_s, meter.ended_s)]
    load = meter.generator_load(windows)
    assert 0.0 <= load.cpu <= 1.5
    if sys.platform == "linux":
        assert meter.machine_load() is not None
        assert meter.mesh_load(windows) is not None
        assert load.first_token_cpu is not None
