"""What the simulated nodes are: their speed, slots, memory, models and faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class FaultKind(StrEnum):
    """``AWAY``: the host cannot be reached. ``SLOW``: decoding and reading take ``factor`` times as long. ``BUSY``: the
    server answers 503.

    The others are lies. ``LYING``: the durations in the server's counters are ``factor`` times the true durations.
    ``SHIFTING``: the total is true, but the reported time of generation is ``factor`` times the true time, and the time
    of reading is the rest. ``MISCOUNTING``: its counts of tokens are ``factor`` times the true counts; 0: all counts
    are 0. ``RANDOM_COUNTS``: each count is the true count multiplied by a random number between 1/``factor`` and
    ``factor``. ``NO_COUNTS``: it gives no counts. ``LISTS_MISSING``: it lists ``model``, and answers 404 for it.
    ``HIDES``: it does not list ``model``, which it has."""

    AWAY = "away"
    SLOW = "slow"
    LYING = "lying"
    BUSY = "busy"
    SHIFTING = "shifting"
    MISCOUNTING = "miscounting"
    RANDOM_COUNTS = "random-counts"
    NO_COUNTS = "no-counts"
    LISTS_MISSING = "lists-missing"
    HIDES = "hides"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong with a node from ``starts_at`` to ``ends_at``, in seconds of the simulated clock.
    ``model``: the full name of the model that a list is wrong about; ``None``: all models of the node."""

    kind: FaultKind
    starts_at: float
    ends_at: float
    factor: float = 1.0
    model: str | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model on one node. ``tokens_per_s``: how fast a stream that runs alone is generated.
    ``prefill_tokens_per_s``: how fast a prompt is read. ``load_s``: seconds to load it into memory. ``vram_mib``: the
    memory that it takes there. ``slots``: the requests that run at the same time."""

    name: str
    tokens_per_s: float
    prefill_tokens_per_s: float
    load_s: float
    vram_mib: float
    slots: int


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node of the simulated fleet.

    - ``models`` are the models on the server's disk, by full name; ``loaded`` are the models in memory at the start.
    - ``share``: how much each other stream slows down a stream: with k streams, a token takes ``(1 + share * (k - 1))``
    times as long.
    - ``prefill_stall``: the share of its speed that decoding loses while a prompt is read (1: it stands still).
    - ``prefill_lanes``: how many prompts are read at the same time, each at full speed. The others wait.
    - ``cache_tokens``: the size of a cache of prompts that all slots share, beside what each slot holds itself (vLLM,
      SGLang). ``lost_tokens``: how much of the text that the slots lose is kept, and can return into one slot
      (llama-server and Ollama: 8 GiB of the host's memory, about 65,000 tokens of an 8B model). Both are lost when
      their model is unloaded.
    - ``vram_mib``: the memory for models; ``None``: without a limit. ``max_loaded``: the most models in memory
      (``OLLAMA_MAX_LOADED_MODELS``).
    - ``context``: the context length of a request that asks for none.
    - ``keep_alive_s``: a model that was not used for this time is unloaded.
    - ``max_pending``: with more requests that wait for a load, the server answers 503.
    - ``max_parallel``: what mesh.yaml says about the node's slots; ``None``: the gateway must learn it.
    - ``rtt_s``: the round trip between gateway and server. ``weight`` is mesh.yaml's.
    """

    name: str
    models: Mapping[str, ModelSpec]
    loaded: tuple[str, ...] = ()
    share: float = 0.2
    prefill_stall: float = 0.9
    prefill_lanes: int = 1
    cache_tokens: int = 0
    lost_tokens: int = 0
    vram_mib: float | None = None
    max_loaded: int = 3
    context: int = 4096
    keep_alive_s: float = 300.0
    max_pending: int = 512
    max_parallel: int | None = None
    rtt_s: float = 0.0
    weight: float = 1.0
    faults: tuple[Fault, ...] = ()
