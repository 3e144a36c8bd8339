"""Reads nvidia-smi's tables by position. A figure that is not a number, such as ``[N/A]``, counts as unknown.

Pure; never raises. docs/internals/nvidia-smi.md describes the tables and how drivers differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpumesh.state import GpuState, ProcessState
from gpumesh.text.printable import printable

# Enough for sixteen GPUs and a thousand processes. To parse 1 MiB of rows takes 100 ms, in which no other task runs.
OUTPUT_BYTES = 128 << 10
# Driver 535 renamed clocks_throttle_reasons to clocks_event_reasons, and accepts the old name as well.
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
# Every driver since 2015 knows these fields. With FIELDS the whole call fails if the driver does not know one of them.
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
# Lines and bytes beyond these limits are not read: this would take the event loop's time, every two seconds.
MAX_LINES = 2048
MAX_LINE_BYTES = 2048
# The highest figures that one GPU can plausibly have. A higher figure counts as unknown: it would spoil the totals, or
# make a node look a thousand times faster or slower than it is.
MAX_MIB = 1 << 24
MAX_W = 10_000.0
MAX_MHZ = 100_000
MAX_C = 300
MAX_FAN_PCT = 200  # by NVML's documentation this is the intended speed, which may be above 100
MAX_INDEX = 1023
MAX_PID = (1 << 32) - 1
_NUMBER = re.compile(r"(?P<number>[+-]?[0-9]{1,12}(?:\.[0-9]{1,9})?)(?: ?(?:MiB|W|%|MHz|C))?")
_MASK = re.compile(r"0x(?P<digits>[0-9a-fA-F]{1,16})")
_DRIVER = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+-]{0,39}")
_PSTATE = re.compile(r"P[0-9]{1,2}")
_ERROR_VALUES = ("err!", "unknown error")
# From nvmlClocksEventReasons in nvml.h, without the reasons that are not a limit (1: idle, 2: set clocks).
_IDLE_BIT = 0x1
_THROTTLE_REASONS = (
    (0x4, "power-cap"),
    (0x8, "hw-slowdown"),
    (0x10, "sync-boost"),
    (0x20, "thermal"),
    (0x40, "hw-thermal"),
    (0x80, "power-brake"),
    (0x100, "display"),
)
# Values of ``GpuState.throttle`` if the clocks are not limited.
IDLE = "idle"
NONE = "none"


@dataclass(frozen=True, slots=True)
class GpuTable:
    """The GPUs of a table. ``faulty_fields``: by a GPU's uuid, the fields whose value is ERR! or Unknown Error.
    ``unread_line``: the first line that is not a row."""

    gpus: tuple[GpuState, ...]
    driver: str | None
    faulty_fields: Mapping[str, tuple[str, ...]]
    unread_line: str | None = None


def read_gpus(output: bytes, fields: Sequence[str] = FIELDS, *, hostname: str | None = None) -> GpuTable:
    """Reads the rows that ``--query-gpu=…`` prints for ``fields``. Skips lines that are not rows, such as warnings, the
    rows of GPUs that it has read already, and all rows after ``MAX_GPUS`` GPUs."""
    gpus: list[GpuState] = []
    seen_uuids: set[str] = set()
    faulty_fields: dict[str, tuple[str, ...]] = {}
    driver: str | None = None
    unread_line: str | None = None
    for line in _list_lines(output):
        row = split_row(line, fields)
        gpu = None if row is None else _read_gpu(row, len(gpus), hostname)
        if row is None or gpu is None:
            unread_line = unread_line or printable(line, 120)
            continue
        if gpu.uuid in seen_uuids or len(gpus) == MAX_GPUS:
            continue
        seen_uuids.add(gpu.uuid)
        gpus.append(gpu)
        driver = driver or _read_driver(row.get("driver_version"))
        gpu_faulty_fields = tuple(field for field, value in row.items() if _is_error_value(field, value))
        if gpu_faulty_fields:
            faulty_fields[gpu.uuid] = gpu_faulty_fields
    return GpuTable(tuple(gpus), driver, faulty_fields, unread_line)


def _is_error_value(field: str, value: str) -> bool:
    """Whether nvidia-smi reports that it could not read this field. The name of a GPU may hold any text, so it never
    counts."""
    return field != "name" and any(mark in value.lower() for mark in _ERROR_VALUES)


def split_row(line: str, fields: Sequence[str]) -> dict[str, str] | None:
    """A row's values by field; ``None`` for a line with too few values. The name may contain commas, so surplus parts
    belong to the name: ``GPU-1, 1234, python, a.py, 300`` has the process name ``python, a.py``."""
    parts = [part.strip() for part in line.split(",")]
    surplus = len(parts) - len(fields)
    if surplus < 0:
        return None
    if surplus:
        is_name = [field in ("name", "process_name") for field in fields]
        name_start = is_name.index(True) if any(is_name) else len(fields) - 1  # without a name, the last field
        name_end = name_start + surplus + 1
        parts[name_start:name_end] = [", ".join(parts[name_start:name_end])]
    return dict(zip(fields, parts, strict=True))


def read_processes(output: bytes) -> dict[str, tuple[ProcessState, ...]]:
    """Reads the rows that ``--query-compute-apps`` prints for ``PROCESS_FIELDS``: the processes by the GPU's uuid. A
    row without a pid is skipped. In a container the list may be empty, or have the pids of the host. So an empty list
    does not mean that a GPU is idle."""
    by_gpu: dict[str, list[ProcessState]] = {}
    count = 0
    for line in _list_lines(output):
        row = split_row(line, PROCESS_FIELDS)
        pid = None if row is None else _read_amount(row["pid"], MAX_PID)
        if row is None or pid is None:
            continue
        if count == MAX_PROCESSES:
            break
        count += 1
        name = _read_text(row["process_name"], 200) or "unknown"
        state = ProcessState(pid=pid, name=name, used_memory_mib=_read_amount(row["used_memory"], MAX_MIB))
        by_gpu.setdefault(printable(row["gpu_uuid"], 80), []).append(state)
    return {uuid: tuple(processes) for uuid, processes in by_gpu.items()}


def _list_lines(output: bytes) -> Iterator[str]:
    """The lines that are not blank, each cut to ``MAX_LINE_BYTES``, among the first ``MAX_LINES`` lines."""
    lines = output[:OUTPUT_BYTES].split(b"\n", MAX_LINES)[:MAX_LINES]  # without the rest, which is not split
    return (line[:MAX_LINE_BYTES].decode("utf-8", "replace") for line in lines if line.strip())


def _read_gpu(row: Mapping[str, str], position: int, hostname: str | None) -> GpuState | None:
    """The GPU of a row; ``None`` for a line that has as many commas as a row, but is not a row. ``position`` is the
    number of GPUs before this GPU: it replaces an index that cannot be read."""
    uuid = _read_text(row.get("uuid"), 80)
    bus = _read_text(row.get("pci.bus_id"), 40)
    index = _read_int(row.get("index", ""))
    name = _read_text(row.get("name"), 100)
    is_real_uuid = uuid is not None and uuid.startswith(("GPU-", "MIG-"))
    if index is None and not is_real_uuid:  # for example a warning that contains commas
        return None
    if uuid is None or not is_real_uuid:
        # A uuid of our own, which no other GPU of this host or of another host has.
        uuid = f"unknown-{hostname or 'host'}-{bus or position}"
    total = _read_amount(row.get("memory.total"), MAX_MIB) or None  # 0 means that the GPU did not say
    temperature = _read_int(row.get("temperature.gpu", ""))  # not an amount, because it may be below 0
    return GpuState(
        index=index if index is not None and 0 <= index <= MAX_INDEX else position,
        uuid=uuid,
        name=name or "unknown GPU",
        memory_total_mib=total,
        memory_used_mib=_read_amount(row.get("memory.used"), total or MAX_MIB),
        memory_free_mib=_read_amount(row.get("memory.free"), total or MAX_MIB),
        utilization_pct=_read_amount(row.get("utilization.gpu"), 100),
        memory_utilization_pct=_read_amount(row.get("utilization.memory"), 100),
        temperature_c=temperature if temperature is not None and abs(temperature) <= MAX_C else None,
        power_w=_read_watts(row.get("power.draw")),
        power_limit_w=_read_watts(row.get("power.limit")),
        clock_sm_mhz=_read_amount(row.get("clocks.sm"), MAX_MHZ),
        fan_pct=_read_amount(row.get("fan.speed"), MAX_FAN_PCT),
        pstate=_read_pstate(row.get("pstate")),
        persistence={"enabled": True, "disabled": False}.get(row.get("persistence_mode", "").lower()),
        throttle=_read_throttle(row.get("clocks_throttle_reasons.active", "")),
        pci_bus_id=bus,
    )


def _read_text(value: str | None, limit: int) -> str | None:
    """The text, cut to ``limit`` characters; ``None`` for the different ways to write "not available"."""
    text = printable(value or "")
    is_in_brackets = text.startswith("[") and text.endswith("]")  # [N/A], [Not Supported], …
    if not text or is_in_brackets or text.lower() in ("n/a", *_ERROR_VALUES):
        return None
    return printable(text, limit)


def _read_float(value: str) -> float | None:
    """The number, without its unit; ``None`` for any other text."""
    match = _NUMBER.fullmatch(value.strip())
    return float(match["number"]) if match else None


def _read_int(value: str) -> int | None:
    number = _read_float(value)
    return None if number is None else round(number)


def _read_amount(value: str | None, limit: int) -> int | None:
    """A number from 0 to ``limit``, rounded; ``None`` for any other value."""
    number = _read_int(value or "")
    return number if number is not None and 0 <= number <= limit else None


def _read_watts(value: str | None) -> float | None:
    """A number from 0 to ``MAX_W``; ``None`` for any other value."""
    number = _read_float(value or "")
    return number if number is not None and 0 <= number <= MAX_W else None


def _read_driver(value: str | None) -> str | None:
    """The driver's version; ``None`` for any other text. The text is checked strictly, because ``audit --write`` writes
    it into mesh.yaml."""
    return value if value is not None and _DRIVER.fullmatch(value) else None


def _read_pstate(value: str | None) -> str | None:
    return value if value is not None and _PSTATE.fullmatch(value) else None


def _read_throttle(value: str) -> str | None:
    """The reasons for lower clocks, joined by commas, from a hexadecimal mask of NVML's bits. ``IDLE`` or ``NONE`` if
    the clocks are not limited; ``None`` for a text that is no mask."""
    match = _MASK.fullmatch(value)
    if not match:
        return None
    mask = int(match["digits"], 16)
    reasons = [reason for bit, reason in _THROTTLE_REASONS if mask & bit]
    if reasons:
        return ",".join(reasons)
    return IDLE if mask & _IDLE_BIT else NONE
