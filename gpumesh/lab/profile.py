"""The profile of a simulated host (GPUs, models, speed), the hosts that `demo` starts, and the faults."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

VERSION = "0.12.6-lab"
DRIVER = "550.54.15"
GPU_4090 = "NVIDIA GeForce RTX 4090"

# A fixed namespace, so that a profile of one name has the same GPU UUIDs in every process and run.
_NAMESPACE = uuid.UUID("5a0d6e1c-6d65-4e5f-9d00-6770756d6573")


class SmiMode(StrEnum):
    """The behaviour of the host's nvidia-smi. Texts and exit codes are those of the real tool."""

    OK = "ok"
    HANG = "hang"
    MISSING = "missing"
    NO_DRIVER = "no-driver"
    DRIVER_MISMATCH = "driver-mismatch"
    NVML_UNKNOWN = "nvml-unknown"
    GPU_LOST = "gpu-lost"
    NO_DEVICES = "no-devices"
    OLD = "old"
    """An old driver: a call that asks for a newer field fails as a whole."""
    UNKNOWN_VALUES = "unknown-values"
    """``[N/A]`` and its spellings where numbers should be."""
    ESCAPES = "escapes"
    """Terminal escapes in the GPU's and the processes' names."""
    GARBAGE = "garbage"
    """Many bytes that are neither a text nor a table."""


@dataclass(frozen=True, slots=True)
class Faults:
    """The faults of a host. By default there are none.

    HTTP faults hit requests whose path starts with one of ``paths`` (if empty: all requests), and at most ``times``
    requests (``None``: no limit). ``refuse`` concerns the whole server: its port is closed, and its connections are
    reset. ``…_after_tokens``: the number of tokens of one answer that are sent before the fault; 0: before the first
    byte.
    """

    refuse: bool = False
    hang: bool = False
    status: int | None = None
    disconnect: bool = False
    """The request is read, then the connection is reset."""
    paths: tuple[str, ...] = ()
    times: int | None = None
    cut_after_tokens: int | None = None
    """The connection is reset in mid-stream."""
    end_after_tokens: int | None = None
    """The body ends as a complete one does, but without a final frame, as when the runner dies."""
    error_line_after_tokens: int | None = None
    """An error frame in mid-stream, under status 200."""
    stall_after_tokens: int | None = None
    """The stream stays open and sends nothing, until the faults are set again."""
    slow: float = 1.0
    """A factor that divides the rates of generation and prefill."""
    on_cpu: bool = False
    """Models load into the host's memory instead of the GPU's (``size_vram`` 0)."""

    nvidia_smi: SmiMode = SmiMode.OK
    nvidia_smi_delay_s: float = 0.0
    foreign_load: float = 0.0
    """The use of the GPU by other programs, 0 to 1, as nvidia-smi shows it."""

    ssh_refuse_key: bool = False
    ssh_hang: bool = False
    """TCP is accepted, but the server never sends a byte."""
    ssh_delay_s: float = 0.0
    """The delay before the SSH banner."""
    ssh_no_forwarding: bool = False
    ssh_no_session: bool = False


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A model in the host's store. ``speed`` multiplies the host's rates (a 14b is slower than a 7b).

    ``continues``: the model's template leaves a last message of the assistant open. Without it, the template closes the
    turn and begins a new one, as plain ChatML does. ``resident``: in memory from the start.
    """

    name: str
    size_mib: int = 4466
    family: str = "qwen2"
    parameter_size: str = "7.6B"
    quantization: str = "Q4_K_M"
    speed: float = 1.0
    context_length: int = 32768
    thinking: bool = False
    embedding: bool = False
    tools: bool = True
    continues: bool = True
    resident: bool = False

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"gpumesh-lab:{self.name}:{self.size_mib}:{self.quantization}".encode()).hexdigest()

    @property
    def vram_mib(self) -> int:
        """The memory for the weights, the context and the runner itself."""
        return self.size_mib + self.size_mib // 8 + 256


QWEN_7B = ModelProfile("qwen2.5:7b")
LLAMA_8B = ModelProfile("llama3.1:8b", 4692, "llama", "8.0B", speed=0.93)
QWEN_14B = ModelProfile("qwen2.5:14b", 8566, "qwen2", "14.8B", speed=0.55)
QWEN3_8B = ModelProfile("qwen3:8b", 4983, "qwen3", "8.2B", speed=0.9, thinking=True)
EMBEDDER = ModelProfile(
    "nomic-embed-text:latest", 262, "nomic-bert", "137M", "F16", context_length=2048, embedding=True
)


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """One GPU; the default is an RTX 4090."""

    index: int
    uuid: str
    name: str = GPU_4090
    memory_mib: int = 24564
    power_limit_w: float = 450.0
    idle_power_w: float = 17.0

    @property
    def pci_bus_id(self) -> str:
        return f"00000000:{self.index + 1:02X}:00.0"


@dataclass(frozen=True, slots=True)
class HostProfile:
    """One simulated host. The rates are those of each stream, however many streams run; ``None``: it takes no time.

    ``slots`` is how many requests a model runs in parallel (``OLLAMA_NUM_PARALLEL``); others wait, and get no sign.
    ``answer_tokens``: the least and the greatest length of an answer. ``backend_port`` is the port on the host itself.
    """

    name: str
    hostname: str
    gpus: tuple[GpuProfile, ...]
    models: tuple[ModelProfile, ...] = (QWEN_7B,)
    tokens_per_s: float | None = 100.0
    prefill_tokens_per_s: float | None = 3000.0
    load_s: float = 2.0
    slots: int = 1
    answer_tokens: tuple[int, int] = (48, 160)
    keep_alive_s: float = 300.0
    prefix_cache: bool = True
    pull_s: float = 1.0
    version: str = VERSION
    driver: str = DRIVER
    ssh: bool = True
    user: str = "root"
    password: str | None = None
    backend_port: int = 11434


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One request for an answer, as the stand-in saw it. ``outcome``: finished, cancelled (by the client), failed (by a
    fault), or running. ``at_s`` is a time on the host's monotonic clock."""

    path: str
    model: str
    at_s: float
    prompt: str
    outcome: str = "running"
    tokens: int = 0
    prompt_tokens: int = 0
    queued_s: float = 0.0
    load_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SimCounters:
    """The counters of a stand-in since its start. They count requests for answers; only ``http`` counts all requests.

    ``in_flight`` includes the requests that wait for a slot; ``running`` are those with a slot. ``requests`` are the
    latest ones, the oldest first.
    """

    started: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    running: int = 0
    max_running: int = 0
    tokens: int = 0
    loads: int = 0
    http: int = 0
    requests: tuple[LoggedRequest, ...] = ()


def make_gpu(host: str, index: int = 0, **changes: Any) -> GpuProfile:
    """A GPU. Its UUID depends only on its host's name and its index."""
    return GpuProfile(index, f"GPU-{uuid.uuid5(_NAMESPACE, f'{host}/{index}')}", **changes)


def make_host(name: str, *, gpus: int = 1, **changes: Any) -> HostProfile:
    """A host with ``gpus`` RTX 4090s. ``changes`` are other values of its HostProfile."""
    hostname = f"sim-{name}-{uuid.uuid5(_NAMESPACE, name).hex[:6]}"
    cards = tuple(make_gpu(name, index) for index in range(gpus))
    return HostProfile(name, hostname, cards, **changes)


def make_hosts(count: int, *, load_s: float = 1.0) -> tuple[HostProfile, ...]:
    """``count`` hosts with one RTX 4090 each. All have the same first model; their rates and their other models
    differ."""
    names = ("reykjavik", "tromso", "oslo", "bergen", "turku", "umea", "lulea", "aarhus")
    rates = (100.0, 80.0, 120.0, 60.0)
    extra = ((LLAMA_8B,), (), (LLAMA_8B, EMBEDDER), (QWEN_14B,))
    return tuple(
        make_host(
            names[number] if number < len(names) else f"host{number + 1}",
            models=(QWEN_7B, *extra[number % len(extra)]),
            tokens_per_s=rates[number % len(rates)],
            load_s=load_s,
        )
        for number in range(count)
    )


def make_instant_host(name: str = "fast", **changes: Any) -> HostProfile:
    """A host that needs no time itself: for measurements of the code between a client and the host."""
    instant: dict[str, Any] = {
        "tokens_per_s": None,
        "prefill_tokens_per_s": None,
        "load_s": 0.0,
        "slots": 1024,
        "prefix_cache": False,
    }
    return make_host(name, **{**instant, **changes})
