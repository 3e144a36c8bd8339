"""Measures how busy the load generator, the mesh and the machine are while a stage runs."""

from __future__ import annotations

import asyncio
import os
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median

from gpumesh.bench.load.conditions import MachineLoad, ProcessLoad
from gpumesh.bench.load.limits.system_load import (
    MachineTimes,
    MainThread,
    ThreadTimes,
    read_machine_times,
    read_process_times,
)

SAMPLE_S = 0.02  # between two samples of the event loop's lag and of the main threads


@dataclass(slots=True)
class _Timeline:
    """The times of a main thread at some moments. ``known``: whether the system tells these times."""

    known: bool = True
    at_s: list[float] = field(default_factory=list)
    run_s: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)

    def add(self, at_s: float, times: ThreadTimes | None) -> None:
        """Adds a sample; ``None``: the thread's times are unknown from now on."""
        if times is None:
            self.known = False
        else:
            self.at_s.append(at_s)
            self.run_s.append(times.run_s)
            self.wait_s.append(times.wait_s)

    def run_time_s(self, begin_s: float, end_s: float) -> float:
        """How long the thread ran between two moments."""
        return interpolate(self.at_s, self.run_s, end_s) - interpolate(self.at_s, self.run_s, begin_s)

    @property
    def is_usable(self) -> bool:
        """Whether the thread's times are known."""
        return self.known and len(self.at_s) >= 2


def interpolate(at_s: Sequence[float], values: Sequence[float], moment_s: float) -> float:
    """The value at a moment, on straight lines between the samples; before the first sample and after the last, the
    value there. There must be a sample."""
    right = bisect_right(at_s, moment_s)
    if right == 0:
        return values[0]
    if right == len(at_s):
        return values[-1]
    share = (moment_s - at_s[right - 1]) / (at_s[right] - at_s[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


def share_in_windows(
    at_s: Sequence[float], values: Sequence[float], windows: Sequence[tuple[float, float]]
) -> float | None:
    """How fast ``values`` (seconds) grew in each window, as seconds per second: the median over the windows.

    ``None`` without samples or windows.
    """
    if not at_s:
        return None
    shares = [
        (interpolate(at_s, values, end_s) - interpolate(at_s, values, begin_s)) / (end_s - begin_s)
        for begin_s, end_s in windows
        if end_s > begin_s
    ]
    return median(shares) if shares else None


class LoadMeter:
    """The measurement of one stage. ``mesh_pid`` is the mesh's process, ``None`` if unknown or if there is no mesh.

    ``lags_ms`` has the lags of this process's event loop: how late it returned from a short sleep. Each measured
    latency can be wrong by such a time.
    """

    def __init__(self, mesh_pid: int | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.lags_ms: list[float] = []
        self.started_s = self.ended_s = 0.0  # on ``clock``
        self._clock = clock
        self._mesh_pid = mesh_pid
        self._own_cpu_s = 0.0
        self._own_timeline, self._mesh_timeline = _Timeline(), _Timeline(known=mesh_pid is not None)
        # Pairs: at the stage's start, and at its end.
        self._machine_times: tuple[MachineTimes | None, MachineTimes | None] = (None, None)
        # The CPU seconds of the mesh's processes, by pid.
        self._process_times: tuple[Mapping[int, float], Mapping[int, float]] = ({}, {})

    @asynccontextmanager
    async def measure(self) -> AsyncGenerator[None]:
        """Measures while the context lasts."""
        own_thread = MainThread(os.getpid())
        mesh_thread = None if self._mesh_pid is None else MainThread(self._mesh_pid)

        def take_sample() -> None:
            now_s = self._clock()
            self._own_timeline.add(now_s, own_thread.read())
            if mesh_thread is not None:
                self._mesh_timeline.add(now_s, mesh_thread.read())

        async def keep_sampling() -> None:
            while True:
                began_s = self._clock()
                await asyncio.sleep(SAMPLE_S)
                self.lags_ms.append(max((self._clock() - began_s - SAMPLE_S) * 1000.0, 0.0))
                take_sample()

        processes, machine = self._read_processes(), read_machine_times()
        self.started_s, own_cpu_s = self._clock(), time.process_time()
        take_sample()
        try:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(keep_sampling())
                try:
                    yield
                finally:
                    self.ended_s, self._own_cpu_s = self._clock(), time.process_time() - own_cpu_s
                    task.cancel()
            take_sample()
            self._machine_times = machine, read_machine_times()
            self._process_times = processes, self._read_processes()
        finally:
            own_thread.close()
            if mesh_thread is not None:
                mesh_thread.close()

    def _read_processes(self) -> Mapping[int, float]:
        return {} if self._mesh_pid is None else read_process_times(self._mesh_pid)

    @property
    def duration_s(self) -> float:
        """How long the stage took."""
        return max(self.ended_s - self.started_s, 1e-9)

    @property
    def has_mesh_process(self) -> bool:
        """Whether the pid of the mesh's process is known."""
        return self._mesh_pid is not None

    @property
    def own_cpu_s(self) -> float:
        """The CPU time of this process in the stage."""
        return self._own_cpu_s

    def generator_load(self, first_token_windows: Sequence[tuple[float, float]]) -> ProcessLoad:
        """How busy this process was. ``first_token_windows``: from the sending of a request to its first piece, on
        the clock."""
        return _process_load(self._own_cpu_s / self.duration_s, self._own_timeline, first_token_windows)

    def mesh_load(self, first_token_windows: Sequence[tuple[float, float]]) -> ProcessLoad | None:
        """How busy the mesh's process was; ``None`` if unknown."""
        cpu_s = self.mesh_cpu_s()
        return (
            None if cpu_s is None else _process_load(cpu_s / self.duration_s, self._mesh_timeline, first_token_windows)
        )

    def tunnel_cpu(self) -> float | None:
        """The CPU of the busiest process that the mesh has started; ``None`` if there is none."""
        others = [cpu for pid, cpu in self._process_cpus().items() if pid not in (self._mesh_pid, os.getpid())]
        return max(others, default=None)

    def mesh_cpu_s(self) -> float | None:
        """The CPU time of the mesh's process in the stage; ``None`` if unknown."""
        cpu = None if self._mesh_pid is None else self._process_cpus().get(self._mesh_pid)
        return None if cpu is None else cpu * self.duration_s

    @property
    def mesh_run_time_s(self) -> Callable[[float, float], float] | None:
        """How long the mesh's main thread ran between two moments on the clock; ``None`` if unknown."""
        return self._mesh_timeline.run_time_s if self._mesh_timeline.is_usable else None

    @property
    def own_run_time_s(self) -> Callable[[float, float], float] | None:
        """As ``mesh_run_time_s``, of this process."""
        return self._own_timeline.run_time_s if self._own_timeline.is_usable else None

    def machine_load(self) -> MachineLoad | None:
        """How busy this machine was; ``None`` if unknown."""
        before, after = self._machine_times
        if before is None or after is None or after.total_s <= before.total_s:
            return None
        generator_cpu = self._own_cpu_s / self.duration_s
        # This process can be one of the mesh's processes, too. It must not count twice.
        mesh_cpu = sum(cpu for pid, cpu in self._process_cpus().items() if pid != os.getpid())
        cores = os.cpu_count() or 1
        busy = min((after.busy_s - before.busy_s) / (after.total_s - before.total_s), 1.0)
        return MachineLoad(cores, busy, other_cpu=max(busy * cores - generator_cpu - mesh_cpu, 0.0))

    def _process_cpus(self) -> dict[int, float]:
        """The CPU of the mesh's processes that ran from the start to the end, by pid; 1 is one core."""
        before, after = self._process_times
        return {pid: (after[pid] - before[pid]) / self.duration_s for pid in before if pid in after}


def _process_load(cpu: float, timeline: _Timeline, windows: Sequence[tuple[float, float]]) -> ProcessLoad:
    """The load of a process by the samples of its main thread."""
    if not timeline.is_usable:
        return ProcessLoad(cpu)
    whole_stage = [(timeline.at_s[0], timeline.at_s[-1])]
    return ProcessLoad(
        cpu,
        waiting=share_in_windows(timeline.at_s, timeline.wait_s, whole_stage),
        first_token_cpu=share_in_windows(timeline.at_s, timeline.run_s, windows),
        first_token_waiting=share_in_windows(timeline.at_s, timeline.wait_s, windows),
    )
