"""nvidia-smi's tables, read by position: what is no number is unknown, whatever it says instead. Pure; never raises.

Shapes and traps: shared facts, nvidia-smi.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpumesh.printable import printable
from gpumesh.state import GpuState, ProcessState

# Sixteen GPUs and a thousand processes fit; a MiB of rows takes 100 ms to read, in which nobody else has a turn.
OUTPUT_BYTES = 128 << 10
# clocks_throttle_reasons was renamed clocks_event_reasons at 535; the old spelling stays accepted.
FIELDS = (
    "index",
    "uuid",
    "pci.bus_id",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "memory.free",
    "utilization.gpu",
    "utilization.memory",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "clocks.sm",
    "fan.speed",
    "pstate",
    "persistence_mode",
    "clocks_throttle_reasons.active",
)
# What every driver since 2015 knows: one unknown field fails the whole call.
OLD_FIELDS = (
    "index",
    "uuid",
    "pci.bus_id",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "memory.free",
    "utilization.gpu",
    "temperature.gpu",
)
PROCESS_FIELDS = ("gpu_uuid", "pid", "process_name", "used_memory")

MAX_GPUS = 64
MAX_PROCESSES = 512
# Of an output's rest nothing is read: it would cost everybody's time, every two seconds.
MAX_LINES = 2048
MAX_LINE = 2048
# What can be believed of one GPU. Beyond these a figure is unknown: it would be the sum of a whole pool, or make a node
# look a thousand times faster or slower than it is.
MOST_MIB = 1 << 24
MOST_W = 10_000.0
MOST_MHZ = 100_000
MOST_C = 300
MOST_FAN_PCT = 200  # NVML: the intended speed, which may be above 100
MOST_INDEX = 1023
MOST_PID = (1 << 32) - 1
_NUMBER = re.compile(r"([+-]?[0-9]{1,12}(?:\.[0-9]{1,9})?)(?: ?(?:MiB|W|%|MHz|C))?")
_HEX = re.compile(r"0x([0-9a-fA-F]{1,16})")
_DRIVER = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+-]{0,39}")
_PSTATE = re.compile(r"P[0-9]{1,2}")
_FAULTY = ("err!", "unknown error")
# nvml.h, nvmlClocksEventReasons; what says nothing of a limit (1: idle, 2: set clocks) has no word here.
_THROTTLE = (
    (0x4, "power-cap"),
    (0x8, "hw-slowdown"),
    (0x10, "sync-boost"),
    (0x20, "thermal"),
    (0x40, "hw-thermal"),
    (0x80, "power-brake"),
    (0x100, "display"),
)
IDLE = "idle"
NONE = "none"


@dataclass(frozen=True, slots=True)
class GpuTable:
    """``faulty_fields``: for each GPU's uuid the fields that it answers with ERR! or Unknown Error. ``unread_line``:
    the first line that is no row, if there is one."""

    gpus: tuple[GpuState, ...]
    driver: str | None
    faulty_fields: Mapping[str, tuple[str, ...]]
    unread_line: str | None = None


def read_gpus(output: bytes, fields: Sequence[str] = FIELDS, *, hostname: str | None = None) -> GpuTable:
    """Rows of ``--query-gpu=…`` for ``fields``. Anything between them (warnings) is passed over."""
    gpus: list[GpuState] = []
    seen: set[str] = set()
    faulty: dict[str, tuple[str, ...]] = {}
    driver: str | None = None
    unread: str | None = None
    for line in _rows(output):
        row = split_row(line, fields)
        gpu = None if row is None else _gpu(row, len(gpus), hostname)
        if row is None or gpu is None:
            unread = unread or printable(line, 120)
            continue
        if gpu.uuid in seen or len(gpus) == MAX_GPUS:
            continue
        seen.add(gpu.uuid)
        gpus.append(gpu)
        driver = driver or _driver(row.get("driver_version"))
        broken = tuple(
            field for field, value in row.items() if field != "name" and any(mark in value.lower() for mark in _FAULTY)
        )
        if broken:
            faulty[gpu.uuid] = broken
    return GpuTable(tuple(gpus), driver, faulty, unread)


def split_row(line: str, fields: Sequence[str]) -> dict[str, str] | None:
    """A row's values by field. The name may hold commas: what is beside it is counted from both ends."""
    parts = [part.strip() for part in line.split(",")]
    extra = len(parts) - len(fields)
    if extra < 0:
        return None
    place = next((number for number, field in enumerate(fields) if field in ("name", "process_name")), len(fields) - 1)
    if extra:
        parts[place : place + extra + 1] = [", ".join(parts[place : place + extra + 1])]
    return dict(zip(fields, parts, strict=True))


def read_processes(output: bytes) -> dict[str, tuple[ProcessState, ...]]:
    """Rows of ``--query-compute-apps`` by the GPU's uuid. In a container the list may be empty or hold the host's
    pids: that a list is empty does not mean that a GPU is idle."""
    found: dict[str, list[ProcessState]] = {}
    count = 0
    for line in _rows(output):
        row = split_row(line, PROCESS_FIELDS)
        pid = None if row is None else _amount(row["pid"], MOST_PID)
        if row is None or pid is None:
            continue
        if count == MAX_PROCESSES:
            break
        count += 1
        name = _words(row["process_name"], 200) or "unknown"
        state = ProcessState(pid=pid, name=name, used_memory_mib=_amount(row["used_memory"], MOST_MIB))
        found.setdefault(printable(row["gpu_uuid"], 80), []).append(state)
    return {uuid: tuple(processes) for uuid, processes in found.items()}


def _rows(output: bytes) -> Iterator[str]:
    """Its lines that hold something, cut to what a row can be."""
    lines = output[:OUTPUT_BYTES].split(b"\n", MAX_LINES)[:MAX_LINES]
    return (line[:MAX_LINE].decode("utf-8", "replace") for line in lines if line.strip())


def _gpu(row: Mapping[str, str], position: int, hostname: str | None) -> GpuState | None:
    """``None`` for a line that has as many commas as a row, but is none."""
    uuid = _words(row.get("uuid"), 80)
    bus = _words(row.get("pci.bus_id"), 40)
    index = _whole(row.get("index", ""))
    name = _words(row.get("name"), 100)
    known = uuid is not None and uuid.startswith(("GPU-", "MIG-"))
    if index is None and not known:
        return None
    if uuid is None or not known:
        # Never taken for another host's GPU, nor for its own neighbour.
        uuid = f"unknown-{hostname or 'host'}-{bus or position}"
    total = _amount(row.get("memory.total"), MOST_MIB) or None  # a GPU without memory is one that did not say
    temperature = _whole(row.get("temperature.gpu", ""))
    return GpuState(
        index=index if index is not None and 0 <= index <= MOST_INDEX else position,
        uuid=uuid,
        name=name or "unknown GPU",
        memory_total_mib=total,
        memory_used_mib=_amount(row.get("memory.used"), total or MOST_MIB),
        memory_free_mib=_amount(row.get("memory.free"), total or MOST_MIB),
        utilization_pct=_amount(row.get("utilization.gpu"), 100),
        memory_utilization_pct=_amount(row.get("utilization.memory"), 100),
        temperature_c=temperature if temperature is not None and abs(temperature) <= MOST_C else None,
        power_w=_watts(row.get("power.draw")),
        power_limit_w=_watts(row.get("power.limit")),
        clock_sm_mhz=_amount(row.get("clocks.sm"), MOST_MHZ),
        fan_pct=_amount(row.get("fan.speed"), MOST_FAN_PCT),
        pstate=_pstate(row.get("pstate")),
        persistence={"enabled": True, "disabled": False}.get(row.get("persistence_mode", "").lower()),
        throttle=_throttle(row.get("clocks_throttle_reasons.active", "")),
        pci_bus_id=bus,
    )


def _words(value: str | None, limit: int) -> str | None:
    """A text that says something; ``[N/A]`` and its many spellings do not."""
    said = printable(value or "")
    lower = said.lower()
    if not said or lower in ("n/a", "err!", "unknown error") or (said.startswith("[") and said.endswith("]")):
        return None
    return printable(said, limit)


def _float(value: str) -> float | None:
    found = _NUMBER.fullmatch(value.strip())
    return float(found[1]) if found else None


def _whole(value: str) -> int | None:
    read = _float(value)
    return None if read is None else round(read)


def _amount(value: str | None, most: int) -> int | None:
    read = _whole(value or "")
    return read if read is not None and 0 <= read <= most else None


def _watts(value: str | None) -> float | None:
    read = _float(value or "")
    return read if read is not None and 0 <= read <= MOST_W else None


def _driver(value: str | None) -> str | None:
    """It is compared with what mesh.yaml expects, and ``audit --write`` writes it there."""
    return value if value is not None and _DRIVER.fullmatch(value) else None


def _pstate(value: str | None) -> str | None:
    return value if value is not None and _PSTATE.fullmatch(value) else None


def _throttle(value: str) -> str | None:
    found = _HEX.fullmatch(value)
    if not found:
        return None
    mask = int(found[1], 16)
    words = [word for bit, word in _THROTTLE if mask & bit]
    return ",".join(words) or (IDLE if mask & 1 else NONE)
