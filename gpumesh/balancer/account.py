"""``NodeAccount``: all that the balancer knows of one node, and the requests that it has placed there. Pure.

The owner tells it what probes found, and what happened to each request. All times are seconds of the caller's clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import msgspec

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.breaker import Breaker, ModelBreakers
from gpumesh.balancer.limits import NodeSlots, SentRequest
from gpumesh.balancer.models.residency import Residency
from gpumesh.balancer.rates import ActivityMeter, ReadStall, ServiceRates
from gpumesh.balancer.work import Work
from gpumesh.topology import BackendKind

# A request is expected to run for at least this share longer than it has run: else an overdue one would end now.
LEAST_REMAINING_SHARE = 0.1
FREE_AT_AGE_S = 0.05  # the time of the next free slot is computed again after this time, even if nothing happened
MAX_KNOWN_TIMES = 256  # of the models of one node; with more, all of them are forgotten


class PlacedRequest(msgspec.Struct, eq=False):
    """A request that was placed on a node, from its placing to its end.

    - ``key`` is its residency key, ``model`` the full name of its model; both are ``None`` for a request that loads no
      model.
    - ``unread_tokens`` of its prompt have to be read, and ``read_s`` are the seconds that this takes; ``cached_tokens``
      are believed to be in the server's cache.
    - ``write_s`` are the expected seconds from the first token to the end. The answer is expected to begin at
      ``begins_at`` and to end at ``ends_at``.
    - ``needs_load``: the answer must wait for a load of the model. ``drain_s``: if this request starts the load, the
      expected wait for the requests to the models that are unloaded before; ``None``: the model was in memory, or an
      earlier request had started its load.
    - ``first_token_at`` is ``None`` until the answer has begun. ``mean_reads``: how many prompts, this one included,
      the node read at once on the mean while it read this one.
    - ``is_charged``: its client was charged for it in the queue. ``had_slow_client``: the client took the answer more
      slowly than the node sent it. ``answer_bytes``: the bytes of the answer's text; ``None``: not measured.
    - ``sent`` is the request as the node's slots count it; ``None`` if they need not be learned.
    - ``gpu_s`` and ``energy_j``: what the request has used (``ActivityMeter``), once it has ended. Before its end they
      are the readings of the meter at the placing.
    - ``read_sum``, ``stream_sum`` and ``busy_sum`` are readings of the node's ``ActivityMeter``: at the placing, and at
      the first token.
    """

    account: NodeAccount
    demand: Demand
    work: Work
    key: ResidencyKey | None
    model: str | None
    sent_at: float
    unread_tokens: float
    cached_tokens: float
    read_s: float
    write_s: float
    needs_load: bool
    drain_s: float | None
    begins_at: float
    ends_at: float
    first_token_at: float | None = None
    mean_reads: float = 1.0
    is_charged: bool = False
    had_slow_client: bool = False
    answer_bytes: int | None = None
    ended: bool = False
    sent: SentRequest | None = None
    read_sum: float = 0.0
    stream_sum: float = 0.0
    busy_sum: float = 0.0
    gpu_s: float = 0.0
    energy_j: float = 0.0

    @property
    def counted_from(self) -> float | None:
        """Since when the request counts as a stream of its node; ``None``: not yet."""
        return self.sent_at if self.demand.is_whole_text else self.first_token_at

    def __repr__(self) -> str:
        phase = "ended" if self.ended else "reading" if self.counted_from is None else "writing"
        return f"<PlacedRequest {self.account.name} {self.model} {phase}>"


class _FreeTime(NamedTuple):
    """The time at which a slot is probably free (``free_at``). It was computed at the time ``computed_at``, when the
    number of the group's events was ``events``."""

    events: int
    computed_at: float
    free_at: float


class GpuGroup:
    """The nodes that share one GPU. They are balanced as one node; usually a group has one member.

    ``others_in_flight`` is the number of requests that other gateways have in flight on this GPU."""

    __slots__ = ("accounts", "events", "name", "others_in_flight")

    def __init__(self, name: str, accounts: Sequence[NodeAccount] = ()) -> None:
        self.name = name
        self.accounts = tuple(accounts)
        self.others_in_flight = 0
        self.events = 0  # grows when a request is placed on this GPU, when its answer begins, and when it ends


class NodeAccount:
    """What the balancer knows of one node.

    ``weight``, ``tier`` and ``max_parallel``, the number of slots, are those of mesh.yaml. ``max_parallel`` is ``None``
    if the server reports the number, or if it is learned. ``fleet_rates``, learned from all nodes, replace rates that
    were not measured on this node."""

    def __init__(
        self,
        name: str,
        *,
        weight: float = 1.0,
        tier: int = 1,
        max_parallel: int | None = None,
        fleet_rates: ServiceRates | None = None,
    ) -> None:
        self.name = name
        self.weight = weight
        self.tier = tier
        self.max_parallel = max_parallel
        self.group = GpuGroup(name, (self,))
        # -- set by the owner, from probes
        self.kind = BackendKind.AUTO
        self.is_up = False
        """Whether the tunnel is up, the server answers, and the node is not draining."""
        self.is_removed = False
        """Whether the scheduler does not have this node any more (``Roster.remove``)."""
        self.models: AbstractSet[str] | None = None
        """The names of its models, as listed and in full; ``None``: the server could not list them, so any may be
        tried."""
        self.reported_parallel: int | None = None
        """The number of requests at once that the server reports; ``None``: it reports no number."""
        self.learns_limit = False
        """Whether the number of slots is learned from the answers."""
        self._rtt_s = 0.0  # the round trip of the tunnel
        self._foreign_load = 0.0  # the share of the GPUs that other programs use, from 0 to 1
        self.slowness = 1.0
        """How many times slower the node is than it was before and than its peers are (``outliers.py``)."""
        # -- learned
        self.breaker = Breaker()
        self.model_breakers = ModelBreakers()
        self.residency = Residency()
        self.rates = ServiceRates(fleet_rates)
        self.learned_at = self.first_token_noted_at = -math.inf
        """When the last answer, and the last time to a first token, was learned from. The scheduler sets them."""
        self.read_stall = ReadStall()
        self.learned_slots = NodeSlots()
        # -- the requests here
        self.placed: set[PlacedRequest] = set()
        self.placed_by_model: dict[str, int] = {}  # how many of them, by the full name of the model
        self.activity = ActivityMeter()
        self._decode_ends_sum = 0.0  # the sum of the times at which the begun answers are expected to end
        self._free_at: dict[str, _FreeTime] = {}  # by model
        self._reads_end_at = 0.0  # when the prompts that were sent so far will be read

    def __repr__(self) -> str:
        state = "up" if self.is_up else "away"
        return f"<NodeAccount {self.name} {state} {len(self.placed)} placed, {self.residency!r}>"

    @property
    def rtt_s(self) -> float:
        """The tunnel's round trip in seconds."""
        return self._rtt_s

    @rtt_s.setter
    def rtt_s(self, seconds: float) -> None:
        self._rtt_s = self.learned_slots.round_trip_s = seconds

    @property
    def foreign_load(self) -> float:
        """The GPU's utilisation by other programs, from 0 to 1. A host may report anything, so the setter keeps the
        value within these bounds; NaN counts as 0."""
        return self._foreign_load

    @foreign_load.setter
    def foreign_load(self, share: float) -> None:
        self._foreign_load = min(share, 1.0) if share > 0.0 else 0.0

    # -- can it serve --------------------------------------------------------------------------------------------

    def is_usable(self, now: float) -> bool:
        """Whether requests may be sent to the node now."""
        return self.is_up and self.breaker.allows(now)

    @property
    def is_suspect(self) -> bool:
        """Whether a breaker of the node has opened, or a model has failed there lately: then the breakers must be asked
        whether a request may be sent."""
        return self.breaker.open_until is not None or bool(self.model_breakers.faults)

    def is_broken_for(self, model: str, now: float, *, despite_doubt: bool = False) -> bool:
        """Whether this model (a full name) must not be asked for here now. ``despite_doubt``: a model that failed for
        an unknown reason may be asked for nevertheless."""
        return model in self.model_breakers.broken(now, despite_doubt=despite_doubt)

    @property
    def in_flight(self) -> int:
        """The requests of this gateway on the node."""
        return len(self.placed)

    @property
    def is_idle(self) -> bool:
        """Whether there is no request on the node's GPU."""
        return (
            not self.placed and (len(self.group.accounts) == 1 or not self.count()) and not self.group.others_in_flight
        )

    def count(self, model: str | None = None) -> int:
        """The number of requests to this model (a full name; ``None``: to any model) on the node's GPU, from all
        gateways. The requests of other gateways count for each model, because their models are not known."""
        accounts, total = self.group.accounts, self.group.others_in_flight
        if len(accounts) == 1:  # nearly always
            return total + (len(self.placed) if model is None else self.placed_by_model.get(model, 0))
        for account in accounts:
            total += len(account.placed) if model is None else account.placed_by_model.get(model, 0)
        return total

    def slots(self, model: str, now: float) -> int | None:
        """How many requests to this model may be on the node at once; ``None``: any number."""
        if self.max_parallel is not None:
            return self.max_parallel
        if self.learns_limit:
            return self.learned_slots.max_in_flight(model, now)
        return self.reported_parallel

    def has_room(self, model: str | None, now: float) -> bool:
        """Whether the node has a free slot for a request to this model."""
        # A learned number is for one model: Ollama has slots for each model in memory. A number in mesh.yaml, or from a
        # server with a single model, is for all requests.
        slots = self.max_parallel
        if slots is None:
            if self.learns_limit:
                return self.count(model or "") < self.learned_slots.max_in_flight(model or "", now)
            slots = self.reported_parallel
        return slots is None or self.count() < slots

    @property
    def counts_by_model(self) -> bool:
        """Whether the node's slots are learned, so that they are counted for each model separately."""
        return self.max_parallel is None and self.learns_limit

    # -- how busy it is ------------------------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        """The answers that are written on the node's GPU now, as far as this gateway knows."""
        accounts = self.group.accounts
        if len(accounts) == 1:
            return self.activity.streams
        return sum(account.activity.streams for account in accounts)

    def remaining_read_s(self, now: float) -> float:
        """The seconds until the prompts that were sent to this node are read; 0 if it reads none."""
        return max(self._reads_end_at - now, 0.0) if self.activity.reading else 0.0

    def mean_remaining_s(self, now: float) -> float:
        """The mean of the seconds that the running answers will still take; 0 if none runs."""
        count = self.activity.streams
        return max(self._decode_ends_sum / count - now, 0.0) if count else 0.0

    def next_free_s(self, now: float, model: str) -> float:
        """The seconds until there is probably a free slot for this model (a full name).

        Each request that comes to full nodes asks for this time. So it is computed again only when something has
        happened on the node's GPU, or after ``FREE_AT_AGE_S``."""
        events = self.group.events
        known = self._free_at.get(model)
        if known is None or known.events != events or not 0.0 <= now - known.computed_at <= FREE_AT_AGE_S:
            if len(self._free_at) > MAX_KNOWN_TIMES:
                self._free_at.clear()
            known = self._free_at[model] = _FreeTime(events, now, now + self._find_next_free_s(now, model))
        return max(known.free_at - now, 0.0)

    def _find_next_free_s(self, now: float, model: str) -> float:
        """Does the work of ``next_free_s``, without its cache."""
        members = self.group.accounts
        running: Collection[PlacedRequest]
        running = self.placed if len(members) == 1 else [placed for member in members for placed in member.placed]
        if self.counts_by_model:
            running = [placed for placed in running if (placed.model or "") == model]
            if not self.learned_slots.limit(model).has_been_full:
                # In slow start each first token may prove one more slot, which is free before any request ends.
                until_first_tokens_s = [placed.begins_at - now for placed in running if placed.first_token_at is None]
                if until_first_tokens_s:
                    return max(min(until_first_tokens_s), 0.0)
        least_s = math.inf
        for placed in running:  # the least ``_remaining_s``, written out because full nodes are often asked for it
            if placed.ends_at - now < least_s:
                least_s = min(max(placed.ends_at - now, LEAST_REMAINING_SHARE * (now - placed.sent_at)), least_s)
        return least_s if running else 0.0

    def drain_s(self, now: float, models: Iterable[str]) -> float:
        """The seconds until all requests to these models (full names) have ended; 0 if there are none."""
        wanted = set(models)
        return max((_remaining_s(placed, now) for placed in self.placed if placed.model in wanted), default=0.0)

    # -- what happens to requests --------------------------------------------------------------------------------

    def place(self, placed: PlacedRequest, now: float, *, load_s: float = 0.0) -> None:
        """Adds a request that is sent to the node now. Its prompt is read when its model is in memory, in ``load_s``
        seconds, and when the prompts that were sent before are read."""
        model = placed.model or ""
        self.group.events += 1
        self.placed.add(placed)
        self.placed_by_model[model] = self.placed_by_model.get(model, 0) + 1
        if self.learns_limit and self.max_parallel is None:  # ``counts_by_model``
            placed.sent = self.learned_slots.note_sent(model, now)
        if placed.demand.is_whole_text:  # nobody sees when its prompt is read: it counts as a stream from the beginning
            placed.stream_sum, placed.busy_sum = self.activity.begin_stream(now)
            self._decode_ends_sum += placed.ends_at
        else:
            placed.read_sum = self.activity.begin_read(now)
            self._reads_end_at = max(self._reads_end_at, now + load_s) + placed.read_s
        placed.gpu_s, placed.energy_j = self.activity.gpu_s, self.activity.energy_j
        if self.breaker.open_until is not None:
            self.breaker = self.breaker.record_start(now)
        if placed.model is not None and self.model_breakers.faults:
            self.model_breakers.record_start(placed.model, now)

    def note_first_token(self, placed: PlacedRequest, now: float) -> None:
        """Notes that the answer has begun: its prompt is read. Does nothing the second time, and for a whole text."""
        if placed.first_token_at is not None or placed.ended or placed.demand.is_whole_text:
            return
        self.group.events += 1
        placed.first_token_at = now
        placed.mean_reads = self.activity.mean_reads(placed.sent_at, placed.read_sum, now)
        self._end_read(now)
        placed.ends_at = now + placed.write_s
        self._decode_ends_sum += placed.ends_at
        placed.stream_sum, placed.busy_sum = self.activity.begin_stream(now)
        if placed.sent is not None:
            self.learned_slots.note_first_token(placed.sent, now)
        if placed.key is not None:
            self.residency.note_answer(placed.key, now)

    def remove(self, placed: PlacedRequest, now: float, counters: ServerCounters | None = None) -> None:
        """Removes a request that has ended, with or without success. ``counters`` are the server's figures for a whole
        answer; ``None`` if there are none. A second call does nothing."""
        if placed.ended:
            return
        placed.ended = True
        self.group.events += 1
        if placed.sent is not None and counters is not None:
            waited_ms, total_ms, load_ms = counters.waited_ms, counters.total_ms, counters.load_ms
            self.learned_slots.note_answer(placed.sent, now, waited_ms=waited_ms, total_ms=total_ms, load_ms=load_ms)
        elif placed.sent is not None:
            self.learned_slots.note_unfinished(placed.sent, now)
        model = placed.model or ""
        self.placed.discard(placed)
        remaining_count = self.placed_by_model.get(model, 1) - 1
        if remaining_count:
            self.placed_by_model[model] = remaining_count
        else:
            self.placed_by_model.pop(model, None)
        if placed.counted_from is None:  # its prompt was still being read
            self._end_read(now)
        else:
            self._decode_ends_sum -= placed.ends_at
            self.activity.end_stream(now)
        # Until here the two fields are the meter's readings at the placing, from here on what the request has used.
        placed.gpu_s, placed.energy_j = self.activity.gpu_s - placed.gpu_s, self.activity.energy_j - placed.energy_j

    def mean_streams(self, placed: PlacedRequest, now: float) -> float:
        """The mean number of answers that were written at once while this one was; at least 1."""
        since = placed.counted_from
        return 1.0 if since is None else self.activity.mean_streams(since, placed.stream_sum, now)

    def stalled_share(self, placed: PlacedRequest, now: float) -> float:
        """The share of the time since the answer began in which prompts of others were read."""
        since = placed.counted_from
        return 0.0 if since is None else self.activity.busy_share(since, placed.busy_sum, now)

    def _end_read(self, now: float) -> None:
        """Notes that one prompt is no longer read. If no prompt is read any more, corrects the expected end of all
        reading."""
        self.activity.end_read(now)
        if not self.activity.reading:
            self._reads_end_at = now


def _remaining_s(placed: PlacedRequest, now: float) -> float:
    """The seconds until this request is expected to end."""
    return max(placed.ends_at - now, LEAST_REMAINING_SHARE * (now - placed.sent_at))
