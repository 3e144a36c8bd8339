"""The simulated nvidia-smi: its queries, table, failure messages and exit statuses, as in the real tool. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gpumesh.lab.inference.runners import IDLE_MIB
from gpumesh.lab.inference.usage import GpuLoad
from gpumesh.lab.profile import GpuProfile, HostProfile, SmiMode

FIRST_PID = 4000  # of the simulated processes
RESERVED_MIB = 372
"""The memory of each GPU that the driver reserves: so used and free memory do not add up to the total."""

_NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n"
)
_LOST = "Unable to determine the device handle for GPU {bus}: GPU is lost.  Reboot the system to recover this GPU\n"
_FAILURES = {  # the exit status and the output of the real tool, for the modes in which every call fails
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


class GpuProcess(NamedTuple):
    """A process that uses GPU memory."""

    pid: int
    name: str
    used_mib: int


@dataclass(frozen=True, slots=True)
class GpuSnapshot:
    """One GPU at one moment. ``busy`` is its use and ``heat`` a slower average of its use, both from 0 to 1."""

    gpu: GpuProfile
    driver: str
    used_mib: int
    busy: float
    heat: float
    processes: tuple[GpuProcess, ...] = ()


def make_snapshots(profile: HostProfile, load: GpuLoad) -> tuple[GpuSnapshot, ...]:
    """Distributes the host's load over its GPUs: each model goes to the GPU with the least used memory.

    Only GPUs with models are busy and warm. A model without GPU memory runs on the CPU, and is left out.
    """
    cards = [GpuSnapshot(gpu, profile.driver, IDLE_MIB, busy=0.0, heat=0.0) for gpu in profile.gpus]
    for number, (_name, model_mib) in enumerate(load.models):
        if cards and model_mib:
            emptiest_index = min(range(len(cards)), key=lambda index: cards[index].used_mib)
            card = cards[emptiest_index]
            process = GpuProcess(FIRST_PID + number, "/usr/local/bin/ollama runner", model_mib)
            cards[emptiest_index] = replace(
                card,
                used_mib=card.used_mib + model_mib,
                busy=load.busy,
                heat=load.heat,
                processes=(*card.processes, process),
            )
    return tuple(cards)


def run_nvidia_smi(argv: Sequence[str], profile: HostProfile, load: GpuLoad, mode: SmiMode) -> tuple[int, bytes]:
    """Runs nvidia-smi with these arguments. Returns the exit status and the output.

    Errors are in the output too: the real tool writes them to stdout. The exit statuses are also those of the real
    tool: 6 for no GPU, 15 for a GPU that is lost, 2 for wrong arguments.
    """
    if mode in _FAILURES:
        status, message = _FAILURES[mode]
        return status, message.encode()
    if mode is SmiMode.GARBAGE:
        return 0, bytes(range(256)) * 2048
    selected = _select_cards(argv, make_snapshots(profile, load))
    if not selected:
        return 6, b"No devices were found\n"
    if mode is SmiMode.GPU_LOST:
        lost_gpu = profile.gpus[0]
        # The whole call fails, unless the option ``-i`` selects only other GPUs.
        if any(card.gpu.index == lost_gpu.index for card in selected):
            short_bus_id = lost_gpu.pci_bus_id.removeprefix("0000")  # this message writes four of its leading zeros
            return 15, _LOST.format(bus=short_bus_id).encode()
    if mode is SmiMode.ESCAPES:
        selected = [replace(card, gpu=replace(card.gpu, name=_ESCAPES)) for card in selected]
    return _answer_options(argv, selected, mode)


def _answer_options(argv: Sequence[str], cards: Sequence[GpuSnapshot], mode: SmiMode) -> tuple[int, bytes]:
    """Returns the exit status, and what the options ask for: a query's answer, a list of GPUs, or else a table.

    The table takes no option but ``-i``; any other option is an error. ``cards`` are the GPUs that ``-i`` has selected.
    """
    format_words = frozenset((_read_option(argv, "--format") or "").split(","))
    gpu_fields = _read_option(argv, "--query-gpu")
    if gpu_fields is not None:
        return _query(gpu_fields, GPU_FIELDS, [(card,) for card in cards], format_words, mode)
    process_fields = _read_option(argv, "--query-compute-apps")
    if process_fields is not None:
        rows = [(card, process) for card in cards for process in card.processes]
        return _query(process_fields, PROCESS_FIELDS, rows, format_words, mode)
    if "-L" in argv or "--list-gpus" in argv:
        lines = [f"GPU {card.gpu.index}: {card.gpu.name} (UUID: {card.gpu.uuid})\n" for card in cards]
        return 0, "".join(lines).encode()
    for word in argv:
        selects_gpus = word.startswith(("-i", "--id"))  # ``_select_cards`` has applied this option already
        if word.startswith("-") and not selects_gpus:
            message = f"Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.\n\n{word}\n"
            return 2, message.encode()
    return 0, _table(cards).encode()


FieldValue = tuple[str, str]
"""A value and its unit; the unit is empty if the value has none."""

_IDLE_MAX_BUSY = 0.02  # a GPU with less use counts as idle: low clocks, state P8
# The figures are typical of an RTX 4090: ``busy`` and ``heat`` move them between those at rest and under full load.
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
    "temperature.gpu": lambda card: (str(round(38 + card.heat * 29)), ""),
    "temperature.memory": lambda _: ("[N/A]", ""),
    "power.draw": lambda card: (f"{_power_w(card):.2f}", "W"),
    "power.draw.instant": lambda card: (f"{_power_w(card):.2f}", "W"),
    "power.limit": lambda card: (f"{card.gpu.power_limit_w:.2f}", "W"),
    "enforced.power.limit": lambda card: (f"{card.gpu.power_limit_w:.2f}", "W"),
    "power.default_limit": lambda card: (f"{card.gpu.power_limit_w:.2f}", "W"),
    "clocks.sm": lambda card: (str(2640 if card.busy > _IDLE_MAX_BUSY else 210), "MHz"),
    "clocks.gr": lambda card: (str(2640 if card.busy > _IDLE_MAX_BUSY else 210), "MHz"),
    "clocks.mem": lambda card: (str(10501 if card.busy > _IDLE_MAX_BUSY else 405), "MHz"),
    "clocks.max.sm": lambda _: ("3105", "MHz"),
    "fan.speed": lambda card: (str(round(card.heat * 46)), "%"),
    "pstate": lambda card: ("P2" if card.busy > _IDLE_MAX_BUSY else "P8", ""),
    "persistence_mode": lambda _: ("Enabled", ""),
    # A mask of bits. 1 means "idle", the usual reason for low clocks; 0 means no reason.
    "clocks_throttle_reasons.active": lambda card: (f"0x{0 if card.busy > _IDLE_MAX_BUSY else 1:016x}", ""),
    "clocks_event_reasons.active": lambda card: (f"0x{0 if card.busy > _IDLE_MAX_BUSY else 1:016x}", ""),
    "compute_mode": lambda _: ("Default", ""),
    "compute_cap": lambda _: ("8.9", ""),
    "mig.mode.current": lambda _: ("[N/A]", ""),
    "ecc.mode.current": lambda _: ("[N/A]", ""),
    "serial": lambda _: ("[N/A]", ""),
    "pcie.link.gen.current": lambda _: ("4", ""),
    "pcie.link.width.current": lambda _: ("16", ""),
    "display_active": lambda _: ("Disabled", ""),
}
_FIELD_ALIASES = {"gpu_uuid": "uuid", "gpu_bus_id": "pci.bus_id", "gpu_name": "name", "clocks.current.sm": "clocks.sm"}

PROCESS_FIELDS: dict[str, Callable[[GpuSnapshot, GpuProcess], FieldValue]] = {
    "gpu_uuid": lambda card, _: (card.gpu.uuid, ""),
    "gpu_name": lambda card, _: (card.gpu.name, ""),
    "gpu_bus_id": lambda card, _: (card.gpu.pci_bus_id, ""),
    "pid": lambda _, process: (str(process.pid), ""),
    "process_name": lambda card, process: (process.name + (_ESCAPES if card.gpu.name == _ESCAPES else ""), ""),
    "used_memory": lambda _, process: (str(process.used_mib), "MiB"),
    "used_gpu_memory": lambda _, process: (str(process.used_mib), "MiB"),
}


def _power_w(card: GpuSnapshot) -> float:
    """The power in W: a busy GPU draws 78 % of the range between its idle power and its limit."""
    return card.gpu.idle_power_w + card.busy * 0.78 * (card.gpu.power_limit_w - card.gpu.idle_power_w)


def _query(
    field_list: str,
    fields: dict[str, Callable[..., FieldValue]],
    rows: Sequence[tuple[object, ...]],
    format_words: frozenset[str],
    mode: SmiMode,
) -> tuple[int, bytes]:
    """Answers ``--query-…``: returns the exit status, and a line of CSV for each row.

    ``field_list`` are the names that the option gives, separated by commas. ``fields`` holds the functions that make a
    row's values, by the field's name; ``rows`` are their arguments. ``format_words`` are the words of ``--format``:
    ``csv``, ``noheader``, ``nounits``. Without ``csv``, or with an unknown field, the query fails with status 2.
    """
    names = [name.strip() for name in field_list.split(",")]
    getters: list[Callable[..., FieldValue]] = []
    for name in names:
        getter = fields.get(name) or fields.get(_FIELD_ALIASES.get(name, ""))
        is_too_new = mode is SmiMode.OLD and name in _FIELDS_OF_NEW_DRIVERS
        if getter is None or is_too_new:
            return 2, f'Field "{name}" is not a valid field to query.\n\n'.encode()
        getters.append(getter)
    if "csv" not in format_words:
        return 2, b"--format= switch is missing. Please run 'nvidia-smi -h' for help.\n\n"
    lines: list[str] = []
    if "noheader" not in format_words:
        lines.append(_header_line(names, getters, rows))
    for row in rows:
        cells = [getter(*row) for getter in getters]
        if mode is SmiMode.UNKNOWN_VALUES:
            cells = [
                _replace_by_unknown(name, cell, column)
                for column, (name, cell) in enumerate(zip(names, cells, strict=True))
            ]
        lines.append(", ".join(_format_cell(cell, units="nounits" not in format_words) for cell in cells))
    return 0, "".join(f"{line}\n" for line in lines).encode()


def _header_line(
    names: Sequence[str], getters: Sequence[Callable[..., FieldValue]], rows: Sequence[tuple[object, ...]]
) -> str:
    """The line of column names, each with its unit: that of the first row. Without rows there are no units."""
    if not rows:
        return ", ".join(names)
    titles: list[str] = []
    for name, getter in zip(names, getters, strict=True):
        _value, unit = getter(*rows[0])
        titles.append(f"{name} [{unit}]" if unit else name)
    return ", ".join(titles)


def _format_cell(cell: FieldValue, *, units: bool) -> str:
    """The value with its unit, if ``units``. A text such as ``[N/A]`` never has a unit."""
    value, unit = cell
    is_number = value[:1].isdigit()
    return f"{value} {unit}" if units and unit and is_number else value


_UNKNOWN_TEXTS = ("[N/A]", "N/A", "[Not Supported]", "[Unknown Error]", "[Insufficient Permissions]", "", "ERR!")


def _replace_by_unknown(name: str, cell: FieldValue, column: int) -> FieldValue:
    """Replaces a value by one of the texts for an unknown value, another text in each column.

    Fields that identify a GPU or a process keep their value, so that a reader can still tell the rows apart.
    """
    if name in ("index", "uuid", "gpu_uuid", "name", "pid"):
        return cell
    return _UNKNOWN_TEXTS[column % len(_UNKNOWN_TEXTS)], ""


def _read_option(argv: Sequence[str], name: str) -> str | None:
    """The value of the option, in the form ``NAME=VALUE`` or ``NAME VALUE``. ``None`` if the option is not given."""
    for position, word in enumerate(argv):
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
        if word == name and position + 1 < len(argv):
            return argv[position + 1]
    return None


def _select_cards(argv: Sequence[str], cards: Sequence[GpuSnapshot]) -> Sequence[GpuSnapshot]:
    """The GPUs that the option ``-i`` names by index, UUID or PCI address; all GPUs without the option."""
    id_list = _read_option(argv, "-i") or _read_option(argv, "--id")
    if not id_list:
        return cards
    ids = set(id_list.split(","))
    return [card for card in cards if {str(card.gpu.index), card.gpu.uuid, card.gpu.pci_bus_id} & ids]


def _table(cards: Sequence[GpuSnapshot]) -> str:
    """The table for people: nvidia-smi's output without options. There is at least one card."""
    driver = cards[0].driver  # the same for all GPUs of a host
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
        utilization, _unit = GPU_FIELDS["utilization.gpu"](card)
        temperature, _unit = GPU_FIELDS["temperature.gpu"](card)
        fan_speed, _unit = GPU_FIELDS["fan.speed"](card)
        pstate, _unit = GPU_FIELDS["pstate"](card)
        power = f"{round(_power_w(card))}W / {round(card.gpu.power_limit_w)}W"
        memory = f"{card.used_mib}MiB / {card.gpu.memory_mib}MiB"
        fan_and_temperature = f"{fan_speed:>3}%   {temperature}C"
        parts += [
            f"| {card.gpu.index:>3}  {card.gpu.name[:25]:<28}On  | {card.gpu.pci_bus_id} Off   |{'N/A':>21} |\n",
            f"| {fan_and_temperature:<11} {pstate:<8} {power:>18} |{memory:>23} |{utilization:>6}%      Default |\n",
            line,
        ]
    return "".join(parts)
