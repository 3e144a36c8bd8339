"""The values that the parts of ``pools`` share: a model's shape, what each host offers, the plan, and a pool's state.

All sizes are in bytes unless their name says MiB. Unknown is ``None``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from gpumesh.pool_spec import KvType

# -- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a GGUF header says of a model, as far as it decides about memory and speed.

    ``layer_bytes`` has the bytes of the weights of each block, in order. ``input_bytes`` are the tensors before the
    first block (token embeddings: llama.cpp keeps them on the head's CPU), ``output_bytes`` those after the last one
    (they count as one layer more). ``kv_elements`` has, for each block, the numbers that one token adds to its KV
    cache (keys and values together). ``file_type`` names the quantisation, as Ollama does (``Q4_K_M``).

    - ``tied_output``: the output uses the token embeddings. They are then in ``output_bytes`` too, because llama.cpp
      puts a copy of them on the device of the output.
    - ``window``: the tokens that a layer with sliding-window attention looks back on; ``window_layers`` says which
      layers these are (empty: none).
    - ``state_bytes``: for each block, the bytes of its recurrent state for one stream (empty: no such block).
    - ``head_size``, ``kv_heads``, ``feed_forward`` (the numbers between the two halves of a block's feed-forward
      part; with experts, those of one expert), ``experts``, ``experts_used`` and ``query_norm`` (queries are normed)
      decide about compute buffers.
    - ``learned_positions``: the model has a tensor with a row for each position that it was trained for.
    - ``obstacles``: why llama-server cannot load the model, or why its memory cannot be computed, in words for people.
    """

    architecture: str
    name: str | None
    file_type: str | None
    layer_bytes: tuple[int, ...]
    input_bytes: int
    output_bytes: int
    kv_elements: tuple[int, ...]
    embedding: int
    vocabulary: int
    heads: int
    trained_context: int | None
    parameters: int
    file_bytes: int
    tied_output: bool = False
    window: int | None = None
    window_layers: tuple[bool, ...] = ()
    state_bytes: tuple[int, ...] = ()
    head_size: int = 0
    kv_heads: int = 0
    feed_forward: int = 0
    experts: int = 0
    experts_used: int = 0
    query_norm: bool = False
    learned_positions: bool = False
    obstacles: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def weights_bytes(self) -> int:
        return sum(self.layer_bytes) + self.input_bytes + self.output_bytes


# -- what each host offers -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceOffer:
    """A device that can hold layers. ``name`` is for people (``NVIDIA GeForce RTX 4090``, ``CPU``). ``index`` is
    nvidia-smi's; ``None``: the host's CPU. ``bytes_per_s``: how fast it reads its weights while it decodes; ``None``:
    unknown. ``held_by_others``: bytes of it that Ollama could free. ``token_cost``: how much longer a step takes for
    each further token in it, as a part of the step of one token; ``None``: not measured."""

    name: str
    index: int | None
    total_bytes: int | None
    free_bytes: int
    bytes_per_s: float | None = None
    held_by_others: int = 0
    token_cost: float | None = None


@dataclass(frozen=True, slots=True)
class HostOffer:
    """What a node offers to a pool. ``limit_bytes``: at most so much in all (``memory`` in mesh.yaml). ``problem``: why
    it can take no part, in words for people; ``hint``: what to do."""

    node: str
    devices: tuple[DeviceOffer, ...] = ()
    limit_bytes: int | None = None
    problem: str | None = None
    hint: str | None = None


class PathKind(StrEnum):
    """The way of the data between the head and a worker."""

    LOCAL = "local"  # the worker is the head's own host, or this machine is the head
    THROUGH_US = "through-us"  # head and worker are both connected with this machine
    HEAD_TO_WORKER = "head-to-worker"  # the head's host logs in to the worker


@dataclass(frozen=True, slots=True)
class WorkerPath:
    """How the head reaches a worker. ``rtt_ms``: the round trip between the two as the data goes; ``bytes_per_s``: how
    fast weights can be sent. ``protocol``: the major version of RPC's protocol that the worker speaks. From 7 on, a
    distance costs less (docs/internals/pools.md). ``None``: unknown."""

    kind: PathKind
    rtt_ms: float | None
    bytes_per_s: float | None = None
    protocol: int | None = None


# -- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What one device gets: the layers ``first_layer`` (from 0) to ``last_layer`` (the output counts as layer number
    ``ModelShape.layers``); none if ``layers`` is 0. ``offered_bytes``: what the plan may use of it. ``draft_bytes``:
    what the draft model needs of it, in all (only on one device of the head)."""

    device: DeviceOffer
    first_layer: int
    layers: int
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    offered_bytes: int
    draft_bytes: int = 0

    @property
    def needed_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.draft_bytes


@dataclass(frozen=True, slots=True)
class MemberPlan:
    """A node's part. ``path`` is ``None`` for the head. ``shares`` are in the order of llama.cpp's devices."""

    node: str
    is_head: bool
    shares: tuple[DeviceShare, ...]
    path: WorkerPath | None = None

    @property
    def layers(self) -> int:
        return sum(share.layers for share in self.shares)


@dataclass(frozen=True, slots=True)
class SpeedForecast:
    """Tokens per second for one stream and for ``streams`` at once (in all), and what a token of one stream waits for.

    ``draft_tokens_per_s``: one stream with the draft model, at the acceptance ``draft_acceptance`` (0 to 1) per token,
    if it proposes ``draft_length`` tokens for each step (llama-server's ``--spec-draft-n-max``).
    """

    tokens_per_s: float
    streams: int
    tokens_per_s_streams: float
    compute_ms: float
    round_trips_ms: float
    draft_tokens_per_s: float | None = None
    draft_acceptance: float | None = None
    draft_length: int | None = None


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """A pool as it will be started, or why it cannot be. ``problems`` is empty if it fits; each says by how much it
    fails. ``advice`` says what would fit (a context, a KV type, a quantisation), and whether one node alone would be
    faster. ``load_s``: the time until it answers; ``sent_bytes``: the weights that go to workers. Both, and ``speed``,
    are ``None`` if they cannot be known."""

    pool: str
    model: str
    shape: ModelShape
    members: tuple[MemberPlan, ...]
    context: int
    parallel: int
    kv_type: KvType
    problems: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    sent_bytes: int | None = None
    load_s: float | None = None
    speed: SpeedForecast | None = None
    draft: ModelShape | None = None

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def head(self) -> MemberPlan:
        return next(member for member in self.members if member.is_head)

    @property
    def workers(self) -> tuple[MemberPlan, ...]:
        """The members that need a worker: other nodes than the head, with at least one layer."""
        return tuple(member for member in self.members if not member.is_head and member.layers)

    @property
    def used_shares(self) -> tuple[tuple[MemberPlan, DeviceShare], ...]:
        """The shares with layers, each with its member, in the order of llama-server's ``--device`` and ``-ts``: the
        head's CPU first, then the workers, then the head's GPUs. (The output is the last layer. On the head, the
        probabilities of all words need not cross the network for each token.)"""
        pairs = [(member, share) for member in self.members for share in member.shares if share.layers]
        return tuple(sorted(pairs, key=lambda pair: pair[1].first_layer))


# -- the state of a pool ---------------------------------------------------------------------------------------------


class PoolPhase(StrEnum):
    """What a pool does now."""

    STOPPED = "stopped"
    PLANNING = "planning"  # hosts and model are being looked at
    STARTING = "starting"  # workers and head are being started
    LOADING = "loading"  # llama-server loads the model
    READY = "ready"
    BACKOFF = "backoff"  # it failed, and is started again at ``retry_in_s``
    FAILED = "failed"  # a person must act
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class MemberState:
    """A member of a running pool. ``measured_bytes``: the weights, KV and compute buffers that llama-server reports for
    it; ``planned_bytes``: the same by the plan."""

    node: str
    is_head: bool
    layers: int
    planned_bytes: int
    measured_bytes: int | None = None
    path: WorkerPath | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool now. ``loaded_bytes`` of ``load_bytes`` have reached the devices, at ``load_bytes_per_s``.

    ``tokens_per_s`` and ``draft_acceptance`` were measured by llama-server on the answers so far. ``starts`` counts the
    starts since `pool up`. ``reason`` says why it is in its phase, ``hint`` what to do.
    """

    pool: str
    model: str
    phase: PoolPhase
    since: datetime | None = None
    reason: str | None = None
    hint: str | None = None
    starts: int = 0
    retry_in_s: float | None = None
    loaded_bytes: int | None = None
    load_bytes: int | None = None
    load_bytes_per_s: float | None = None
    left_s: float | None = None
    members: tuple[MemberState, ...] = field(default=())
    predicted: SpeedForecast | None = None
    tokens_per_s: float | None = None
    draft_acceptance: float | None = None
