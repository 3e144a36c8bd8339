"""What the simulated nodes are: their speed, slots, memory, models and faults; and how much work they can do. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class FaultKind(StrEnum):
    """``AWAY``: the host cannot be reached. ``SLOW``: decoding and reading take ``factor`` times as long. ``LYING``:
    the durations in the server's counters are ``factor`` times the true ones. ``BUSY``: the server answers 503."""

    AWAY = "away"
    SLOW = "slow"
    LYING = "lying"
    BUSY = "busy"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong with a node from ``starts_at`` to ``ends_at``, in seconds of the simulated clock."""

    kind: FaultKind
    starts_at: float
    ends_at: float
    factor: float = 1.0


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

    - ``models`` are those that the server has on its disk, by full name; ``loaded`` those in memory at the start.
    - ``share``: how much longer each other stream makes a token take: with k streams ``(1 + share * (k - 1))``.
    - ``prefill_stall``: the share of its speed that decoding loses while a prompt is read (1: it stands still).
    - ``prefill_lanes``: how many prompts are read at the same time, each at full speed. The others wait.
    - ``cache_tokens``: the size of a cache of prompts that all slots share, beside what each slot holds itself. It is
      lost when its model is unloaded.
    - ``vram_mib``: the memory for models; ``None``: without a limit. ``max_loaded``: the most models in memory
      (``OLLAMA_MAX_LOADED_MODELS``).
    - ``context``: the context length of a request that asks for none.
    - ``keep_alive_s``: a model that was not used for so long is unloaded.
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
    vram_mib: float | None = None
    max_loaded: int = 3
    context: int = 4096
    keep_alive_s: float = 300.0
    max_pending: int = 512
    max_parallel: int | None = None
    rtt_s: float = 0.0
    weight: float = 1.0
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class MeanWork:
    """The mean request of one model: its share of all requests, and the tokens that it reads and generates."""

    model: str
    share: float
    unread_tokens: float
    output_tokens: float


def fleet_capacity(nodes: Iterable[NodeSpec], work: Iterable[MeanWork]) -> float:
    """The requests per second that the fleet can serve at most, if each node gets the same mix of requests, with all
    models that it has in its memory."""
    all_work = tuple(work)
    return sum(node_capacity(node, all_work) for node in nodes)


def node_capacity(node: NodeSpec, work: Iterable[MeanWork]) -> float:
    """The requests per second that one node can serve at most; 0 if it has none of the models.

    All its slots are busy then: each reads a prompt or generates. At ``x`` requests a second the slots need
    ``x * decode_s`` seconds of decoding in each second. The more they read, the less they can decode
    (``_decoding_rate``). So the rate at which both are equal is found by bisection.
    """
    own = [(part, node.models[part.model]) for part in work if part.model in node.models]
    total_share = sum(part.share for part, _ in own)
    if total_share <= 0:
        return 0.0
    prefill_s = sum(part.share * part.unread_tokens / model.prefill_tokens_per_s for part, model in own) / total_share
    decode_s = sum(part.share * part.output_tokens / model.tokens_per_s for part, model in own) / total_share
    slots = max(round(sum(part.share * model.slots for part, model in own) / total_share), 1)
    low, high = 0.0, slots / (prefill_s + decode_s)
    if prefill_s > 0:
        high = min(high, node.prefill_lanes / prefill_s)
    for _ in range(60):
        rate = (low + high) / 2.0
        keeps_up = rate * decode_s < _decoding_rate(node, slots, rate * prefill_s)
        low, high = (rate, high) if keeps_up else (low, rate)
    return low


def _decoding_rate(node: NodeSpec, slots: int, reading: float) -> float:
    """How many seconds of decoding alone all slots of a busy node get in one second. ``reading``: the mean number of
    slots that read a prompt. With one lane that is the share of time in which one slot reads; with more lanes each slot
    reads independently of the others."""

    def rate_with(readers: int) -> float:
        streams = slots - readers
        speed = 1.0 - node.prefill_stall if readers else 1.0
        return streams * speed / (1.0 + node.share * (streams - 1)) if streams else 0.0

    if node.prefill_lanes == 1:
        share = min(reading, 1.0)
        return (1.0 - share) * rate_with(0) + share * rate_with(1)
    share = min(reading / slots, 1.0)
    return sum(
        math.comb(slots, readers) * share**readers * (1.0 - share) ** (slots - readers) * rate_with(readers)
        for readers in range(slots + 1)
    )
