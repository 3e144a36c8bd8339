"""The output of nvidia-smi on a simulated host. Pure. Forms, texts and exit statuses are those of the real tool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gpumesh.lab.engine import IDLE_MIB, GpuLoad
from gpumesh.lab.profile import GpuProfile, HostProfile, SmiMode

RESERVED_MIB = 372
"""The memory that the driver reserves: so used and free memory do not add up to the total."""

_NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n"
)
_LOST = "Unable to determine the device handle for GPU {bus}: GPU is lost.  Reboot the system to recover this GPU\n"
_FAILURES = {
    SmiMode.MISSING: (127, "sh: 1: nvidia-smi: not found\n"),
    SmiMode.NO_DRIVER: (9, _NO_DRIVER),
    SmiMode.DRIVER_MISMATCH: (
        18,
        "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.161\n",
    ),
    SmiMode.NVML_UNKNOWN: (255, "Failed to initialize NVML: Unknown Error\n"),
    SmiMode.NO_DEVICES: (6, "No devices were found\n"),
}
_ESCAPES = "\x1b[2J\x1b[31mNVIDIA\x1b]0;owned\x07 GeForce\r RTX 4090\x9b5m\u202e"
_FIELDS_OF_NEW_DRIVERS = frozenset(
    {"utilization.memory", "clocks_event_reasons.active", "power.draw.instant", "compute_cap"}
)


@dataclass(frozen=True, slots=True)
class GpuSnapshot:
    """One GPU at one moment. ``processes``: pid, name and MiB of each. ``busy`` and ``warmth`` are from 0 to 1."""

    gpu: GpuProfile
    driver: str
    used_mib: int
    busy: float
    warmth: float
    processes: tuple[tuple[int, str, int], ...] = ()


def make_snapshots(profile: HostProfile, load: GpuLoad) -> tuple[GpuSnapshot, ...]:
    """Distributes the host's load over its GPUs. Each model goes to the GPU with the least used memory, and only GPUs
    with models are busy."""
    cards = [GpuSnapshot(gpu, profile.driver, IDLE_MIB, 0.0, load.warmth) for gpu in profile.gpus]
    for number, (_, mib) in enumerate(load.models):
        if cards and mib:
            emptiest = min(range(len(cards)), key=lambda index: cards[index].used_mib)
            card = cards[emptiest]
            process = (4000 + number, "/usr/local/bin/ollama runner", mib)
            processes = (*card.processes, process)
            cards[emptiest] = replace(card, used_mib=card.used_mib + mib, busy=load.busy, processes=processes)
    return tuple(card if card.processes else replace(card, warmth=0.0) for card in cards)


def run_nvidia_smi(argv: Sequence[str], profile: HostProfile, load: GpuLoad, mode: SmiMode) -> tuple[int, bytes]:
    """Runs ``nvidia-smi argv…``. Returns the exit status and the output. Errors go to stdout, as with the real tool."""
    if mode in _FAILURES:
        status, text = _FAILURES[mode]
        return status, text.encode()
    if mode is SmiMode.GARBAGE:
        return 0, bytes(range(256)) * 2048
    selected = _select_cards(argv, make_snapshots(profile, load))
    if selected is None:
        return 6, b"No devices were found\n"
    if mode is SmiMode.GPU_LOST and any(card.gpu.index == profile.gpus[0].index for card in selected):
        return 15, _LOST.format(bus=profile.gpus[0].pci_bus_id.removeprefix("0000")).encode()
    if mode is SmiMode.ESCAPES:
        selected = [replace(card, gpu=replace(card.gpu, name=_ESCAPES)) for card in selected]
    format_words = frozenset(_option(argv, "--format", "").split(","))
    for prefix, fields, rows in (
        ("--query-gpu", GPU_FIELDS, [(card,) for card in selected]),
        ("--query-compute-apps", APP_FIELDS, [(card, process) for card in selected for process in card.processes]),
    ):
        wanted = _option(argv, prefix, None)
        if wanted is not None:
            return _query(wanted.split(","), fields, rows, format_words, mode)
    if "-L" in argv or "--list-gpus" in argv:
        lines = [f"GPU {card.gpu.index}: {card.gpu.name} (UUID: {card.gpu.uuid})\n" for card in selected]
        return 0, "".join(lines).encode()
    unknown = next((word for word in argv if word.startswith("-") and not word.startswith(("-i", "--id"))), None)
    if unknown is not None:
        return (
            2,
            f"Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.\n\n{unknown}\n".encode(),
        )
    return 0, _table(selected).encode()


FieldValue = tuple[str, str]
"""A value and its unit; the unit is empty if the value has none."""

GPU_FIELDS: dict[str, Callable[[GpuSnapshot], FieldValue]] = {
    "index": lambda card: (str(card.gpu.index), ""),
    "uuid": lambda card: (card.gpu.uuid, ""),
    "pci.bus_id": lambda card: (card.gpu.pci_bus_id, ""),
    "name": lambda card: (card.gpu.name, ""),
    "driver_version": lambda card: (card.driver, ""),
    "memory.total": lambda card: (str(card.gpu.memory_mib), "MiB"),
    "memory.reserved": lambda _: (str(RESERVED_MIB), "MiB"),
    "memory.used": lambda card: (str(card.used_mib), "MiB"),
    "memory.free": lambda card: (str(max(0, card.gpu.memory_mib - RESERVED_MIB - card.used_mib)), "MiB"),
    "utilization.gpu": lambda card: (str(round(card.busy * 97)), "%"),
    "utilization.memory": lambda card: (str(round(card.busy * 71)), "%"),
    "temperature.gpu": lambda card: (str(round(38 + card.warmth * 29)), ""),
    "temperature.memory": lambda _: ("[N/A]", ""),
    "power.draw": lambda card: (f"{_power(card):.2f}", "W"),
    "power.draw.instant": lambda card: (f"{_power(card):.2f}", "W"),
    "power.limit": lambda card: (f"{card.gpu.power_limit_w:.2f}", "W"),
    "enforced.power.limit": lambda card: (f"{card.gpu.power_limit_w:.2f}", "W"),
    "power.default_limit": lambda card: (f"{card.gpu.power_limit_w:.2f}", "W"),
    "clocks.sm": lambda card: (str(2640 if card.busy > 0.02 else 210), "MHz"),
    "clocks.gr": lambda card: (str(2640 if card.busy > 0.02 else 210), "MHz"),
    "clocks.mem": lambda card: (str(10501 if card.busy > 0.02 else 405), "MHz"),
    "clocks.max.sm": lambda _: ("3105", "MHz"),
    "fan.speed": lambda card: (str(round(card.warmth * 46)), "%"),
    "pstate": lambda card: ("P2" if card.busy > 0.02 else "P8", ""),
    "persistence_mode": lambda _: ("Enabled", ""),
    "clocks_throttle_reasons.active": lambda card: (f"0x{0 if card.busy > 0.02 else 1:016x}", ""),
    "clocks_event_reasons.active": lambda card: (f"0x{0 if card.busy > 0.02 else 1:016x}", ""),
    "compute_mode": lambda _: ("Default", ""),
    "compute_cap": lambda _: ("8.9", ""),
    "mig.mode.current": lambda _: ("[N/A]", ""),
    "ecc.mode.current": lambda _: ("[N/A]", ""),
    "serial": lambda _: ("[N/A]", ""),
    "pcie.link.gen.current": lambda _: ("4", ""),
    "pcie.link.width.current": lambda _: ("16", ""),
    "display_active": lambda _: ("Disabled", ""),
}
_ALIASES = {"gpu_uuid": "uuid", "gpu_bus_id": "pci.bus_id", "gpu_name": "name", "clocks.current.sm": "clocks.sm"}

APP_FIELDS: dict[str, Callable[[GpuSnapshot, tuple[int, str, int]], FieldValue]] = {
    "gpu_uuid": lambda card, _: (card.gpu.uuid, ""),
    "gpu_name": lambda card, _: (card.gpu.name, ""),
    "gpu_bus_id": lambda card, _: (card.gpu.pci_bus_id, ""),
    "pid": lambda _, process: (str(process[0]), ""),
    "process_name": lambda card, process: (process[1] + (_ESCAPES if card.gpu.name == _ESCAPES else ""), ""),
    "used_memory": lambda _, process: (str(process[2]), "MiB"),
    "used_gpu_memory": lambda _, process: (str(process[2]), "MiB"),
}


def _power(card: GpuSnapshot) -> float:
    return card.gpu.idle_power_w + card.busy * 0.78 * (card.gpu.power_limit_w - card.gpu.idle_power_w)


def _query(
    wanted: Sequence[str],
    fields: dict[str, Callable[..., FieldValue]],
    rows: Sequence[tuple[object, ...]],
    format_words: frozenset[str],
    mode: SmiMode,
) -> tuple[int, bytes]:
    names = [name.strip() for name in wanted]
    getters: list[Callable[..., FieldValue]] = []
    for name in names:
        getter = fields.get(name) or fields.get(_ALIASES.get(name, ""))
        if getter is None or (mode is SmiMode.OLD and name in _FIELDS_OF_NEW_DRIVERS):
            return 2, f'Field "{name}" is not a valid field to query.\n\n'.encode()
        getters.append(getter)
    if "csv" not in format_words:
        return 2, b"--format= switch is missing. Please run 'nvidia-smi -h' for help.\n\n"
    no_units = "nounits" in format_words
    lines: list[str] = []
    for row in rows:
        cells = [getter(*row) for getter in getters]
        if mode is SmiMode.UNKNOWN_VALUES:
            cells = [
                _replace_by_unknown(name, cell, column)
                for column, (name, cell) in enumerate(zip(names, cells, strict=True))
            ]
        lines.append(
            ", ".join(
                value if no_units or not unit or not value[:1].isdigit() else f"{value} {unit}" for value, unit in cells
            )
        )
    if "noheader" not in format_words:
        units = [unit for _, unit in (getter(*rows[0]) for getter in getters)] if rows else [""] * len(names)
        lines.insert(
            0, ", ".join(f"{name} [{unit}]" if unit else name for name, unit in zip(names, units, strict=True))
        )
    return 0, "".join(f"{line}\n" for line in lines).encode()


_UNKNOWNS = ("[N/A]", "N/A", "[Not Supported]", "[Unknown Error]", "[Insufficient Permissions]", "", "ERR!")


def _replace_by_unknown(name: str, cell: FieldValue, column: int) -> FieldValue:
    """One of the texts for an unknown value, except for fields that identify a GPU or a process."""
    if name in ("index", "uuid", "gpu_uuid", "name", "pid"):
        return cell
    return _UNKNOWNS[column % len(_UNKNOWNS)], ""


def _option(argv: Sequence[str], name: str, default: str | None) -> str:
    for position, word in enumerate(argv):
        if word.startswith(f"{name}="):
            return word[len(name) + 1 :]
        if word == name and position + 1 < len(argv):
            return argv[position + 1]
    return default  # type: ignore[return-value]


def _select_cards(argv: Sequence[str], cards: Sequence[GpuSnapshot]) -> list[GpuSnapshot] | None:
    """The GPUs of the option ``-i``, or all. ``None`` if there is no such GPU."""
    id_list = next((value for name in ("-i", "--id") if (value := _option(argv, name, ""))), "")
    if not id_list:
        return list(cards) or None
    ids = set(id_list.split(","))
    return [card for card in cards if {str(card.gpu.index), card.gpu.uuid, card.gpu.pci_bus_id} & ids] or None


def _table(cards: Sequence[GpuSnapshot]) -> str:
    """The table for people: the output without options."""
    driver = cards[0].driver
    line = "+" + "-" * 41 + "+" + "-" * 24 + "+" + "-" * 22 + "+\n"
    parts = [
        "+" + "-" * 89 + "+\n",
        f"| NVIDIA-SMI {driver:<22} Driver Version: {driver:<14} CUDA Version: 12.4     |\n",
        f"|{'SIMULATED by the lab of gpumesh':^89}|\n",
        line,
        "| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |\n",
        "| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |\n",
        line,
    ]
    for card in cards:
        value = {name: GPU_FIELDS[name](card)[0] for name in GPU_FIELDS}
        busy = value["utilization.gpu"]
        usage = f"{round(float(value['power.draw']))}W / {round(card.gpu.power_limit_w)}W"
        memory = f"{card.used_mib}MiB / {card.gpu.memory_mib}MiB"
        warm = f"{value['fan.speed']:>3}%   {value['temperature.gpu']}C"
        parts += [
            f"| {card.gpu.index:>3}  {card.gpu.name[:25]:<28}On  | {card.gpu.pci_bus_id} Off   |{'N/A':>21} |\n",
            f"| {warm:<11} {value['pstate']:<8} {usage:>18} |{memory:>23} |{busy:>6}%      Default |\n",
            line,
        ]
    return "".join(parts)
