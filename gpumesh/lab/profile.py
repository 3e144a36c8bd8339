"""What a simulated host is like: its profile (GPUs, models, speed), the faults that it can have, and its counters.

The hosts of ``gpumesh demo`` are in demo_hosts.py.
"""

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
    """How the host's nvidia-smi behaves or fails. Texts and exit codes are those of the real tool."""

    OK = "ok"
    HANG = "hang"
    MISSING = "missing"
    NO_DRIVER = "no-driver"
    DRIVER_MISMATCH = "driver-mismatch"
    NVML_UNKNOWN = "nvml-unknown"
    GPU_LOST = "gpu-lost"
    NO_DEVICES = "no-devices"
    OLD = "old"
    """An old driver: if a query names one field that only newer drivers have, the whole query fails."""
    UNKNOWN_VALUES = "unknown-values"
    """``[N/A]`` or another text for "unknown" where a number should be."""
    ESCAPES = "escapes"
    """Terminal escapes in the names of GPUs and processes."""
    GARBAGE = "garbage"
    """Many bytes that are neither a text nor a table."""


@dataclass(frozen=True, slots=True)
class Faults:
    """The faults of a host; several can be there at the same time. By default there are none.

    HTTP faults hit requests whose path starts with one of ``paths`` (if empty: all requests), and at most ``times``
    requests (``None``: no limit). ``…_after_tokens``: the number of tokens of one answer that are sent before the
    fault; 0: before the first byte.
    """

    refuse: bool = False
    """The port of the whole server is closed, and its connections are reset."""
    hang: bool = False
    """A request gets no answer until the faults are set again."""
    status: int | None = None
    """A request gets an error with this HTTP status."""
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
    """The server refuses port forwarding (direct-tcpip channels)."""
    ssh_no_session: bool = False
    """The server refuses sessions, so no command can run."""


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A model in the host's store. ``speed`` multiplies the host's rates (a 14b is slower than a 7b).

    ``continues``: the model's template leaves a last message of the assistant open, so that the model continues this
    message. If ``continues`` is false, the template closes the turn and begins a new one, as plain ChatML does.
    ``resident``: the model is in memory from the start.
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
        """A SHA-256 in hex, as Ollama has for a model. It is the same in every run, because only names go into it."""
        return hashlib.sha256(f"gpumesh-lab:{self.name}:{self.size_mib}:{self.quantization}".encode()).hexdigest()

    @property
    def vram_mib(self) -> int:
        """The GPU memory that the loaded model uses, in MiB: its weights, its context and the runner itself.

        It is only a rough estimate.
        """
        context_mib, runner_mib = self.size_mib // 8, 256
        return self.size_mib + context_mib + runner_mib


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
        """The PCI address as nvidia-smi writes it: domain, bus, device and function. Each GPU has a bus of its own."""
        return f"00000000:{self.index + 1:02X}:00.0"


@dataclass(frozen=True, slots=True)
class HostProfile:
    """One simulated host: its hardware, models and speed.

    ``tokens_per_s`` and ``prefill_tokens_per_s`` are the rates of a stream alone; with ``None``, this part of an answer
    takes no time. With ``k`` streams on the host, a token takes ``1 + share * (k - 1)`` times as long. If
    ``prefill_stalls``, prompts are read one after the other, and no stream gets a token meanwhile; otherwise each is
    read at the full rate, and nothing else notices. ``slots`` is how many requests a model runs in parallel
    (``OLLAMA_NUM_PARALLEL``); the other requests wait, and get no sign. ``max_loaded`` is how many models may be in
    memory (``OLLAMA_MAX_LOADED_MODELS``); ``None``: all that fit, but at most three for each GPU. ``context`` is
    the context of a request without ``num_ctx``, in tokens (``OLLAMA_CONTEXT_LENGTH``).

    ``prefix_cache``: a slot does not compute again the beginning of a prompt that its last text has too.
    ``shared_cache``: nor a beginning that the text of any other slot has. ``lost_tokens``: how many tokens of the texts
    that slots have lost are kept in the host's memory (``--cache-ram``; llama-server's default of 8 GiB holds about
    65,000 tokens of an 8B model). ``answer_tokens``: the least and the greatest length of an answer. ``load_s`` and
    ``pull_s`` are the seconds that a model's load and its download take. ``backend_port`` is the port of the inference
    server on the host itself, behind SSH.
    """

    name: str
    hostname: str
    gpus: tuple[GpuProfile, ...]
    models: tuple[ModelProfile, ...] = (QWEN_7B,)
    tokens_per_s: float | None = 100.0
    prefill_tokens_per_s: float | None = 3000.0
    share: float = 0.0
    prefill_stalls: bool = False
    load_s: float = 2.0
    slots: int = 1
    max_loaded: int | None = None
    context: int = 32768
    answer_tokens: tuple[int, int] = (48, 160)
    keep_alive_s: float = 300.0
    prefix_cache: bool = True
    shared_cache: bool = False
    lost_tokens: int = 0
    pull_s: float = 1.0
    version: str = VERSION
    driver: str = DRIVER
    ssh: bool = True
    user: str = "root"
    password: str | None = None
    backend_port: int = 11434


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One request for an answer, as the stand-in saw it.

    ``outcome`` is ``finished``, ``cancelled`` (by the client), ``failed`` (by a fault) or ``running``. ``at_s`` is the
    time of the request on the host's monotonic clock. ``prompt`` is the end of the rendered prompt. ``tokens`` counts
    the sent tokens. ``read_tokens`` are those of ``prompt_tokens`` that were not in the cache.
    """

    path: str
    model: str
    at_s: float
    prompt: str
    outcome: str = "running"
    tokens: int = 0
    prompt_tokens: int = 0
    read_tokens: int = 0
    queued_s: float = 0.0
    load_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SimCounters:
    """The counters of a stand-in since its start, of requests for answers; only ``http`` counts all HTTP requests.

    ``in_flight`` includes the requests that wait for a slot; ``running`` are those with a slot. ``requests`` are the
    latest requests, the oldest first.
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
    """Makes the profile of an RTX 4090. Its UUID depends only on ``host``, the host's name, and on ``index``.

    ``changes`` are other values of its GpuProfile.
    """
    return GpuProfile(index, f"GPU-{uuid.uuid5(_NAMESPACE, f'{host}/{index}')}", **changes)


def make_host(name: str, *, gpus: int = 1, **changes: Any) -> HostProfile:
    """Makes the profile of a host with ``gpus`` RTX 4090s. ``changes`` are other values of its HostProfile."""
    hostname = f"sim-{name}-{uuid.uuid5(_NAMESPACE, name).hex[:6]}"  # the same in every run
    cards = tuple(make_gpu(name, index) for index in range(gpus))
    return HostProfile(name, hostname, cards, **changes)


def make_instant_host(name: str = "fast", **changes: Any) -> HostProfile:
    """Makes the profile of a host that answers without delay: for measurements of the code between client and host.

    ``changes`` are other values of its HostProfile.
    """
    without_delay: dict[str, Any] = {
        "tokens_per_s": None,
        "prefill_tokens_per_s": None,
        "load_s": 0.0,
        "slots": 1024,
        "prefix_cache": False,
    }
    return make_host(name, **{**without_delay, **changes})
