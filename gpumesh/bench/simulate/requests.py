"""The values that pass between the parts of the simulator, and ``Decisions``, the protocol of a simulated balancer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, Protocol

import msgspec

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.base import Priority
from gpumesh.balancer.outcomes import Outcome


class SimulatedRequest(msgspec.Struct):
    """A request of a workload, as its client sends it. It is the same object in each simulation of the workload.

    ``at_s``: when it is sent, in seconds from the start. ``model`` is a full name. ``output_tokens`` are the tokens of
    its answer, which the balancer does not know. ``blocks`` are the ids of the prompt's blocks of ``block_tokens``
    tokens: equal ids are an equal prompt up to the end of this block. ``end_blocks``: the same for the prompt with the
    answer, as the server's cache holds it afterwards. ``context`` is the ``num_ctx`` asked for; ``None``: the server's
    default. ``next_turn``: the request that the client sends ``think_s`` seconds after this one's answer; its ``at_s``
    is not used. ``number`` counts the requests of the workload from 0.
    """

    number: int
    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    end_blocks: tuple[int, ...] = ()
    block_tokens: int = 512
    context: int | None = None
    client: str = ""
    priority: Priority = Priority.NORMAL
    session: str | None = None
    max_tokens: int | None = None
    next_turn: SimulatedRequest | None = None
    think_s: float = 0.0


class Job(msgspec.Struct):
    """A request on its way through the mesh, from its arrival to its end.

    ``submitted_at``: when it came. ``sent_at``: when it was sent to a node first; ``None``: it waits in the gateway's
    queue. ``first_token_at``: of the first attempt that had one. ``prompt_tokens`` and ``tokens_left`` change when a
    cut answer is continued: the next attempt reads what was generated before. ``attempts`` counts the attempts that
    were sent, ``rounds`` the rounds in which all nodes are tried, from 1 on. ``failed_nodes`` are the names of the
    nodes that failed the request in this round.
    """

    request: SimulatedRequest
    submitted_at: float
    prompt_tokens: int
    tokens_left: int
    sent_at: float | None = None
    first_token_at: float | None = None
    attempts: int = 0
    rounds: int = 1
    failed_nodes: frozenset[str] = frozenset()


class Attempt(msgspec.Struct, eq=False):
    """One attempt of a job on one server. Its times are the times at which the gateway notices an event, half a round
    trip later than the server. ``running`` is the balancer's own object for it.

    ``ready_at``: the model was in memory. ``slot_at``: it got a slot. ``first_token_at``: its prompt was read.
    ``unread_tokens``: the tokens of the prompt that were not in the server's cache. ``slot`` is the server's object.
    ``decode_from``: the GPU's virtual time (``gpu.py``) at the first token, and ``decode_s`` the virtual seconds that
    the answer takes.
    """

    job: Job
    node: str
    running: Any
    arrived_at: float = 0.0
    ready_at: float = 0.0
    slot_at: float = 0.0
    first_token_at: float = 0.0
    unread_tokens: int = 0
    prefill_s: float = 0.0
    decode_from: float = 0.0
    decode_s: float = 0.0
    slot: Any = None
    has_first_token: bool = False


class ServerReport(NamedTuple):
    """What a probe of a node has found. ``is_up``: the server answers. ``listed`` are the models that it lists, by full
    name. ``loaded`` are the models in its memory, by full name: for each its size in MiB and its context length. Both
    are the same objects until they change."""

    is_up: bool
    listed: AbstractSet[str]
    loaded: Mapping[str, tuple[int, int]]


class Grant(NamedTuple):
    """A decision of the balancer: the job is sent to this node. ``node`` is ``None`` if no node can serve the job any
    more. ``running`` is the balancer's own object for what it has sent; it comes back with the attempt."""

    job: Job
    node: str | None
    running: Any = None


class Decisions(Protocol):
    """A balancer that decides in the simulator. ``now`` is in seconds of the simulated clock, and never decreases."""

    def submit(self, job: Job, now: float) -> Grant | None:
        """Decides for a job that has come, or that has failed on a node (``job.failed_nodes``). ``None``: it waits in
        the queue. A grant without a node: the queue is full, or no node can serve the job."""
        ...

    def grants(self, now: float) -> Sequence[Grant]:
        """Decides for the jobs in the queue. Called after each event that may have freed a slot."""
        ...

    def next_check(self, now: float) -> float | None:
        """The time at which ``grants`` must be called although nothing happens until then; ``None``: there is none."""
        ...

    def note_first_token(self, attempt: Attempt, now: float) -> None: ...

    def end(self, attempt: Attempt, now: float, outcome: Outcome, counters: ServerCounters | None) -> None:
        """Frees the attempt's slot, and learns from how it ended."""
        ...

    def set_report(self, node: str, report: ServerReport, now: float) -> None:
        """Takes what a probe of the node has found. Each node is probed before the first request comes."""
        ...
