"""Forecasts what a request costs on a node: its own time there, and the time that it takes from others. Pure.

The sum over all requests of their time to finish is least if each request goes where this cost is least: its own time,
and the delay of the requests that run there or will come. All parts are seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from gpumesh.balancer.account import NodeAccount, PlacedRequest
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.experience import Experience
from gpumesh.balancer.models.model_demand import ModelDemand
from gpumesh.balancer.work import Work

# A model that was not asked for in this time would be unloaded by the server anyway (OLLAMA_KEEP_ALIVE).
RELOAD_HORIZON_S = 300.0
# A model stays where it is for about this time. During this time, one copy more makes the requests wait less, and one
# copy less makes them wait more.
COPY_HORIZON_S = 60.0
# The slots count as busy for at most this share of the time: towards 1.0 the formula for the wait grows without end.
MOST_BUSY = 0.98
# A load must pay for itself: if requests ask for the model, it stays for at least LEAST_STAY times its load time.
LEAST_STAY = 2.0
# nvidia-smi's utilisation is the share of time in which any kernel ran: at 1.0 another program takes about half.
FOREIGN_SHARE = 0.5
# Prompts are read one after another. So reading also delays requests that come later: on the mean by READ_DELAY of its
# time on an idle node, and by more the busier the node is with reading (as in an M/G/1 queue: by busy / (1 - busy)).
READ_DELAY = 0.8
MOST_READING = 0.9  # a greater share of the time counts as this one
RETURN_SHARE = 1.0  # this share of the prompts in a cache is continued later: in a chat, nearly all
# The slots of up to this many copies of a model are counted again for each request. Those of more copies are counted
# only when the last count is older than COUNT_S.
MAX_COUNTED_COPIES = 16
COUNT_S = 1.0
MAX_COUNTED_KEYS = 1000  # with more counts, all are forgotten
# What it costs to push out a model that mesh.yaml pins: so much that it happens only if no other node can serve the
# request.
PINNED_COST_S = 3600.0


class Forecast(msgspec.Struct, frozen=True, gc=False):
    """What a request would cost on a node, in seconds.

    - ``way_s``: the tunnel's round trip.
    - ``wait_s``: until a slot is free.
    - ``load_s``: until the model is in memory. It includes the drain of the models that the load pushes out.
    - ``read_s``: until the prompt is read. It includes the reading of the prompts that were sent before;
      ``own_read_s`` does not.
    - ``write_s``: from the first token to the last.
    - ``others_s``: the delay of the requests that run there.
    - ``evicted_s``: the expected reloads of the models that the load pushes out, and the expected reading of prompts
      that this one pushes out of the server's cache.

    ``total_s`` is the sum of these, without ``own_read_s``. ``is_free``: the node has a free slot now.
    ``unread_tokens`` of the prompt are not in the server's cache. ``pushed_out`` are the full names of the models that
    the load pushes out.
    """

    node: str
    is_free: bool
    way_s: float
    wait_s: float
    load_s: float
    read_s: float
    write_s: float
    others_s: float
    evicted_s: float
    unread_tokens: float
    own_read_s: float
    pushed_out: Sequence[str]
    total_s: float

    @property
    def own_s(self) -> float:
        """The request's own time to finish."""
        return self.way_s + self.wait_s + self.load_s + self.read_s + self.write_s


class FleetLoad(msgspec.Struct, gc=False):
    """What a forecast must know of the rest of the fleet: what was learned (``experience``), how often each model is
    asked for (``demands``), which nodes have each model in memory (``copies``), and the full names of the models that
    must not be pushed out (``pinned``)."""

    experience: Experience
    demands: ModelDemand
    copies: Copies
    pinned: frozenset[str] = frozenset()


class Copies:
    """Which nodes have which model in memory, and how many slots there are for each residency key."""

    def __init__(self) -> None:
        # The nodes with a model in memory: by the full name of the model, then by the name of the node.
        self._holders: dict[str, dict[str, NodeAccount]] = {}
        self._models: dict[str, frozenset[str]] = {}  # the models that a node has in memory, by the name of the node
        # A cache: when the slots for a key were counted, and how many all nodes had.
        self._slot_counts: dict[ResidencyKey, tuple[float, int]] = {}

    def update(self, account: NodeAccount) -> None:
        """Notes which models the node has in memory now."""
        if account.is_removed:
            return
        name, loaded = account.name, account.residency.loaded
        if len(self._models) <= MAX_COUNTED_COPIES:  # the counts of a small fleet are exact, also in the same moment
            self._slot_counts.clear()
        before = self._models.get(name, frozenset())
        if loaded.keys() == before:
            return
        self._models[name] = frozenset(loaded)
        for model in self._models[name] - before:
            self._holders.setdefault(model, {})[name] = account
        for model in before - self._models[name]:
            self._remove_holder(model, name)

    def remove(self, name: str) -> None:
        """Forgets a node that was removed."""
        for model in self._models.pop(name, frozenset()):
            self._remove_holder(model, name)
        self._slot_counts.clear()  # the counts include the slots of the removed node

    def _remove_holder(self, model: str, name: str) -> None:
        """Forgets that the node ``name`` has the model in memory."""
        holders = self._holders[model]
        del holders[name]
        if not holders:
            del self._holders[model]

    def other_nodes_slots(self, key: ResidencyKey, account: NodeAccount, now: float) -> int:
        """The number of slots for this key on the other nodes that have its model in memory.

        They are counted once for all nodes that are compared for a request. If more than ``MAX_COUNTED_COPIES`` nodes
        have the model, the number may be up to ``COUNT_S`` seconds old."""
        copies = self._holders.get(key.model)
        if not copies:
            return 0
        counted_at, slots = self._slot_counts.get(key, (-math.inf, 0))
        oldest_s = 0.0 if len(copies) <= MAX_COUNTED_COPIES else COUNT_S
        if not 0.0 <= now - counted_at <= oldest_s:
            slots = sum(_slots_for(key, other, now) for other in copies.values())
            if len(self._slot_counts) > MAX_COUNTED_KEYS:
                self._slot_counts.clear()
            self._slot_counts[key] = (now, slots)
        own_slots = _slots_for(key, account, now) if account.name in copies else 0
        return max(slots - own_slots, 0)


def _slots_for(key: ResidencyKey, account: NodeAccount, now: float) -> int:
    """The number of the node's slots if the node serves this key without a load; otherwise 0. A node with any number of
    slots counts as one slot."""
    if not account.is_usable(now) or not account.residency.is_resident(key):
        return 0
    return account.slots(key.model, now) or 1


def forecast(
    account: NodeAccount,
    demand: Demand,
    work: Work,
    fleet: FleetLoad,
    queue_s: float,
    now: float,
) -> Forecast:
    """Forecasts the cost of a request on this node, whether the node has a free slot or not.

    ``queue_s``: the seconds for which the requests that wait before this one will keep the node's slots busy. It counts
    only if the node has no free slot."""
    key = demand.residency
    activity, residency = account.activity, account.residency
    model = "" if key is None else key.model

    # The load of the model.
    load_s, evicted_s, blocked_s = 0.0, 0.0, 0.0
    pushed_out: Sequence[str] = ()
    if key is not None and residency.is_tracked:
        if not residency.is_resident(key):
            blocked_s, load_s, evicted_s, pushed_out = _forecast_load(account, key, fleet, now)
        else:
            loading_until = residency.loaded[model].loading_until
            if loading_until is not None:
                load_s = max(loading_until - now, 0.0)

    # The reading of the prompt.
    speed = account.weight
    if account.foreign_load or account.slowness != 1.0:
        speed *= (1.0 - FOREIGN_SHARE * account.foreign_load) / account.slowness
    pace = account.rates.pace(model)
    cached = work.cached
    cached_tokens = cached.get(account.name, 0.0) if cached else 0.0
    # Here conditions stand instead of ``min`` and ``max``, which take three times as long: most of the balancer's time
    # goes into this function.
    unread_tokens = work.prompt_tokens - cached_tokens
    if not unread_tokens > 1.0:
        unread_tokens = 1.0
    read_s = own_read_s = unread_tokens * pace.read_token_s / speed
    if activity.reading:
        read_s += max(account.remaining_read_s(now) - load_s, 0.0)

    # The writing of the answer, and what the reading and the writing cost others.
    read_share, stall = activity.read_share(now), account.read_stall.value
    write_s = work.answer_tokens * pace.token_s / (speed * (1.0 - stall * read_share))
    reading = min(MOST_READING, read_share)
    # The delay of requests that come later, because their prompts are read after this one (``READ_DELAY``).
    others_s = own_read_s * (READ_DELAY + reading / (1.0 - reading))
    # The prompts that are read now are answers when this one is read. Answers of other nodes on the same GPU count too;
    # for a node that is alone there, ``account.streams`` would give the same number.
    streams = activity.reading + (activity.streams if len(account.group.accounts) == 1 else account.streams)
    if streams:
        write_s *= 1.0 + pace.share * streams
        # Each running answer slows down or stands still while the prompt is read, and is slower while both are written.
        overlap_s = account.mean_remaining_s(now) or write_s
        overlap_s = min(overlap_s, write_s)
        slowdown = pace.share / (1.0 + pace.share * (streams - 1))  # relative to the time without this answer
        stalled_s = min(overlap_s, own_read_s)
        others_s += streams * (stall * stalled_s + overlap_s * slowdown)

    # The prompts that this prompt pushes out of the server's cache. The node with the most of this prompt in its cache
    # would only replace the beginning of the same prompt. Another node replaces another prompt, and must then read that
    # prompt again when its next turn comes.
    if cached and demand.prompt is not None and cached_tokens < max(cached.values()):
        displaced_tokens = fleet.experience.displaced_tokens(demand, account.name)
        evicted_s += RETURN_SHARE * displaced_tokens * pace.read_token_s / speed

    # The wait for a slot. A node loads one model at a time: while another load must come first, a free slot is of no
    # use.
    is_free = not blocked_s and account.has_room(model, now)
    wait_s = 0.0 if is_free else (blocked_s or account.next_free_s(now, model)) + queue_s

    way_s = account.rtt_s
    total_s = way_s + wait_s + load_s + read_s + write_s + others_s + evicted_s
    return Forecast(
        account.name,
        is_free,
        way_s,
        wait_s,
        load_s,
        read_s,
        write_s,
        others_s,
        evicted_s,
        unread_tokens,
        own_read_s,
        pushed_out,
        total_s,
    )


def _forecast_load(
    account: NodeAccount, key: ResidencyKey, fleet: FleetLoad, now: float
) -> tuple[float, float, float, Sequence[str]]:
    """Forecasts the load of a model. Returns the seconds until this load can begin, the seconds from then
    until the model is in memory, what the load costs later requests, and the names of the models that it pushes out."""
    residency, rates = account.residency, account.rates
    pushed_out = residency.pushed_out_by(key, account.placed_by_model)
    drain_s = account.drain_s(now, pushed_out) if pushed_out and account.placed else 0.0
    blocked_s = max(residency.next_load_starts_at(now) - now, 0.0)
    later_s = 0.0
    for model in pushed_out:
        loaded = residency.loaded[model]
        evicted_key = loaded.key or ResidencyKey(model, loaded.context_length)  # no key: another program loaded it
        rate = fleet.demands.rate(evicted_key, now)
        if model in fleet.pinned:
            later_s += PINNED_COST_S
        # A model that will be asked for again stays for a while, so that its load serves several requests. On an idle
        # node no request would be served meanwhile, so the wait would only lose time.
        is_asked_for = rate * RELOAD_HORIZON_S > 1.0
        if is_asked_for and account.placed:
            stays_until = loaded.loaded_at + LEAST_STAY * rates.load_s(model)
            blocked_s = max(blocked_s, stays_until - now)
        later_s += _eviction_s(account, evicted_key, rate, fleet, now)
    load_s = rates.load_s(key.model)
    later_s -= _gain_s(account, key, fleet, now)  # later requests for the loaded model will wait less
    return blocked_s, drain_s + load_s, max(later_s, 0.0), pushed_out


def _eviction_s(account: NodeAccount, key: ResidencyKey, rate: float, fleet: FleetLoad, now: float) -> float:
    """The expected delay of later requests if this node unloads this model, which is asked for ``rate`` times a second.

    If this is the last copy of the model, the next request must load it again, and the requests that come during that
    load wait too. If other nodes have copies, their slots will be busier."""
    if rate <= 0.0:
        return 0.0
    other_slots = fleet.copies.other_nodes_slots(key, account, now)
    if other_slots:
        return _copy_value_s(account, key, rate, other_slots, fleet, now)
    load_s = account.rates.load_s(key.model)
    will_be_asked = 1.0 - math.exp(-rate * RELOAD_HORIZON_S)
    # The first request waits for the whole load, and each that comes during the load for half of it on the mean.
    return will_be_asked * load_s * (1.0 + rate * load_s / 2.0)


def _gain_s(account: NodeAccount, key: ResidencyKey, fleet: FleetLoad, now: float) -> float:
    """The seconds of waiting that a new copy of the model on this node saves all later requests together. 0 if nobody
    asks for the model, and for the first copy, which is loaded because a request needs it."""
    other_slots = fleet.copies.other_nodes_slots(key, account, now)
    rate = fleet.demands.rate(key, now)
    return _copy_value_s(account, key, rate, other_slots, fleet, now) if other_slots and rate > 0.0 else 0.0


def _copy_value_s(
    account: NodeAccount, key: ResidencyKey, rate: float, other_slots: int, fleet: FleetLoad, now: float
) -> float:
    """The seconds of waiting that this node's copy of the model saves all requests of ``COPY_HORIZON_S`` together.
    There are ``rate`` requests a second. They wait longer if they have only ``other_slots`` than if they have this
    node's slots too."""
    slots = other_slots + (account.slots(key.model, now) or 1)
    service_s = fleet.demands.service_s(key)
    return rate * COPY_HORIZON_S * (mean_wait_s(rate, service_s, other_slots) - mean_wait_s(rate, service_s, slots))


@lru_cache(maxsize=64)  # for most of the nodes that are compared for one request, the arguments are the same
def mean_wait_s(rate: float, service_s: float, slots: int) -> float:
    """The mean time that a request waits for one of ``slots`` slots, if requests come at random, ``rate`` a second, and
    each takes ``service_s`` on the mean.

    An approximation for M/M/c queues: Sakasegawa, "An approximation formula L_q = a b^p / (1 - p)", 1977."""
    busy = min(rate * service_s / slots, MOST_BUSY)
    return service_s / slots * math.pow(busy, math.sqrt(2.0 * (slots + 1)) - 1.0) / (1.0 - busy)


def place_on(account: NodeAccount, demand: Demand, work: Work, expected: Forecast, now: float) -> PlacedRequest:
    """Places the request on the node. ``expected`` is the forecast for this node: its times become the request's times.
    If the request makes the server load its model, the model counts as loaded from now on."""
    key = demand.residency
    begins_at = now + expected.way_s + expected.load_s + expected.read_s
    needs_load = False
    drain_s: float | None = None
    if key is not None:
        residency = account.residency
        needs_load = expected.load_s > 0.0 and not residency.is_resident(key)
        if needs_load:
            drain_s = account.drain_s(now, expected.pushed_out) if expected.pushed_out and account.placed else 0.0
            residency.note_sent(key, expected.pushed_out, now=now, load_s=expected.load_s)
        else:
            is_still_loading = residency.note_use(key.model, now)
            needs_load = is_still_loading  # an earlier request has started the load
    model = None if key is None else key.model
    unread_tokens = expected.unread_tokens
    # A forecast has at least one unread token, so 1 stands for a prompt that is wholly in the cache.
    cached_tokens = work.prompt_tokens - unread_tokens if unread_tokens > 1.0 else work.prompt_tokens
    placed = PlacedRequest(
        account,
        demand,
        work,
        key,
        model,
        now,  # sent_at
        unread_tokens,
        cached_tokens,
        expected.own_read_s,  # read_s
        expected.write_s,
        needs_load,
        drain_s,
        begins_at,
        begins_at + expected.write_s,  # ends_at
    )
    account.place(placed, now, load_s=expected.load_s)
    return placed
