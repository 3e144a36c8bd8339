"""What a simulated host is, and what may go wrong with it: frozen values that travel as JSON to the host's process."""

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
    """How the host's nvidia-smi behaves; texts and exit codes are those of the real tool."""

    OK = "ok"
    HANG = "hang"
    MISSING = "missing"
    NO_DRIVER = "no-driver"
    DRIVER_MISMATCH = "driver-mismatch"
    NVML_UNKNOWN = "nvml-unknown"
    GPU_LOST = "gpu-lost"
    NO_DEVICES = "no-devices"
    OLD = "old"
    """Knows only the fields of an old driver: a newer field fails the whole call."""
    UNKNOWN_VALUES = "unknown-values"
    """``[N/A]`` and its spellings where numbers should be."""
    ESCAPES = "escapes"
    """Terminal escapes in the GPU's and the processes' names."""
    GARBAGE = "garbage"
    """Bytes that are no text, no table, and many."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong now. The default is: nothing.

    HTTP faults hit requests whose path starts with one of ``paths`` (all, if empty), and at most ``times`` of them
    (without bound if ``None``). ``refuse`` is of the whole server: its port is closed and its connections are reset.
    ``…_after_tokens`` counts the tokens of one answer that were sent in full; 0 is before the first byte.
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
    """The body ends as if complete, without a final frame: the runner died."""
    error_line_after_tokens: int | None = None
    """An error frame in mid-stream, under status 200."""
    stall_after_tokens: int | None = None
    """The stream goes quiet and stays open, until the faults are set anew."""
    slow: float = 1.0
    """Divides the rates of generation and prefill."""
    on_cpu: bool = False
    """Models load into the host's memory instead of the GPU's (``size_vram`` 0)."""

    nvidia_smi: SmiMode = SmiMode.OK
    nvidia_smi_delay_s: float = 0.0
    foreign_load: float = 0.0
    """Somebody else's use of the GPU, 0 to 1, as nvidia-smi shows it."""

    ssh_refuse_key: bool = False
    ssh_hang: bool = False
    """TCP is accepted, and nothing is ever said."""
    ssh_delay_s: float = 0.0
    """Before the SSH banner."""
    ssh_no_forwarding: bool = False
    ssh_no_session: bool = False


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A model in the host's store. ``speed`` multiplies the host's rates (a 14b is slower than a 7b).

    ``continues``: its template continues a last message of the assistant; a plain chatml one closes the turn and
    starts anew. ``resident``: in memory from the start.
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
        """Weights, context and the runner's own."""
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
    """One simulated host. Rates are those of one stream, whatever else runs; ``None`` means no time at all.

    ``slots`` is how many requests a model runs in parallel (``OLLAMA_NUM_PARALLEL``); the rest waits, quietly.
    ``answer_tokens`` bounds the natural length of an answer. ``backend_port`` is the port as seen from the host.
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
    """One request for an answer, as the stand-in saw it. ``outcome``: finished, cancelled (the client went), failed
    (a fault), or running. ``at_s`` is the host's monotonic clock."""

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
    """What a stand-in has done so far, requests for answers only. ``in_flight`` includes those that wait for a slot;
    ``running`` hold one. ``requests`` are the latest, oldest first. ``http`` counts every request of any kind."""

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
    """A GPU whose UUID follows from its host's name and its index."""
    return GpuProfile(index, f"GPU-{uuid.uuid5(_NAMESPACE, f'{host}/{index}')}", **changes)


def make_host(name: str, *, gpus: int = 1, **changes: Any) -> HostProfile:
    """A host with 4090s, as the defaults have it, with ``changes``."""
    hostname = f"sim-{name}-{uuid.uuid5(_NAMESPACE, name).hex[:6]}"
    cards = tuple(make_gpu(name, index) for index in range(gpus))
    return HostProfile(name, hostname, cards, **changes)


def make_hosts(count: int, *, load_s: float = 1.0) -> tuple[HostProfile, ...]:
    """``count`` hosts with a 4090 each: unequal in rate, and in what they store beside the model that all have."""
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
    """A host that takes no time of its own: for measuring what stands before it."""
    timeless: dict[str, Any] = {
        "tokens_per_s": None,
        "prefill_tokens_per_s": None,
        "load_s": 0.0,
        "slots": 1024,
        "prefix_cache": False,
    }
    return make_host(name, **{**timeless, **changes})
