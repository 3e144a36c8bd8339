"""Scales the times of a workload, so that its work is a given share of what the fleet can do. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from random import Random

from gpumesh.bench.simulate.fleet import NodeSpec
from gpumesh.bench.simulate.requests import Attempt, Job, SimulatedRequest
from gpumesh.bench.simulate.servers.prefix_cache import PrefixCache
from gpumesh.bench.simulate.servers.server import SimulatedServer
from gpumesh.bench.simulate.workloads import Workload
from gpumesh.errors import UsageError

SAMPLE_SIZE = 4000  # requests of each model, for the capacity of the nodes
MOST_MEASURED = 100_000  # if requests come at random: this number gives their rate within 0.5 %
MIN_SATURATED = 100  # requests of each slot: enough to make the start, when all slots read, negligible


@dataclass(frozen=True, slots=True)
class OfferedWork:
    """The work of a workload. ``rate``: requests per second from the first to the last arrival. ``samples``: some
    requests of each model, as pairs: the tokens of the prompt that must be read, and the tokens of the answer.
    ``shares``: the share of each model in all requests."""

    rate: float
    samples: Mapping[str, Sequence[tuple[int, int]]]
    shares: Mapping[str, float]


def scale_to_load(workload: Workload, nodes: Sequence[NodeSpec], load: float) -> Workload:
    """The workload with its times changed so that its requests come at ``load`` (0.8: 80 %) times the rate that the
    fleet can serve at most (``fleet_capacity``).

    Which part of a prompt must be read depends on the policy. Here a part counts as read if one cache, as large as the
    caches of all nodes together, would not hold it. Raises UsageError if no node can serve the workload's models.
    """
    work = measure_workload(workload, nodes)
    return scale_to_capacity(workload, work.rate, fleet_capacity(nodes, work), load)


def scale_to_capacity(workload: Workload, rate: float, capacity: float, load: float) -> Workload:
    """``scale_to_load`` for a workload that was measured before: its requests come ``rate`` times a second, and the
    fleet serves ``capacity`` of them a second. Raises UsageError if the capacity is 0."""
    if capacity <= 0:
        raise UsageError("no node of the fleet has a model of the workload")
    return workload.scaled(rate / (load * capacity))


def measure_workload(workload: Workload, nodes: Sequence[NodeSpec]) -> OfferedWork:
    """``measure_work`` for a workload. Requests come at random, so the first are like all others."""
    is_steady = not workload.trace and not workload.batch
    return measure_work(islice(workload, MOST_MEASURED) if is_steady else workload, nodes)


def measure_work(requests: Iterable[SimulatedRequest], nodes: Sequence[NodeSpec]) -> OfferedWork:
    """Measures the work of these requests. Raises UsageError if there are none."""
    cache = _PooledCache(nodes)
    rng = Random(0)  # which requests are in the samples
    samples: dict[str, list[tuple[int, int]]] = {}
    counts: dict[str, int] = {}
    first_at_s: float | None = None
    last_at_s = 0.0
    # The workload has the first request of each conversation. The later turns have no time of their own.
    for first_turn in requests:
        if first_at_s is None:
            first_at_s = first_turn.at_s
        last_at_s = first_turn.at_s
        for request in _turns(first_turn):
            cached_tokens = cache.use(request) if request.blocks else 0
            unread_tokens = max(request.prompt_tokens - cached_tokens, 1)
            count = counts[request.model] = counts.get(request.model, 0) + 1
            # Reservoir sampling (Vitter's algorithm R): each request is in the sample with the same probability.
            if count <= SAMPLE_SIZE:
                samples.setdefault(request.model, []).append((unread_tokens, request.output_tokens))
            elif (position := int(rng.random() * count)) < SAMPLE_SIZE:
                samples[request.model][position] = (unread_tokens, request.output_tokens)
    total = sum(counts.values())
    if not total:
        raise UsageError("the workload has no requests")
    span_s = last_at_s - (first_at_s or 0.0)
    rate = total / span_s if span_s > 0 else float(total)  # requests that all come at one moment count as one second's
    shares = {model: count / total for model, count in counts.items()}
    return OfferedWork(rate=rate, samples=samples, shares=shares)


def fleet_capacity(nodes: Iterable[NodeSpec], work: OfferedWork) -> float:
    """The most requests per second that the fleet can serve, if each node serves the mix of requests for its own
    models, one model after the other. 0 if no node has a model.

    A model that only few or slow nodes have bounds the rate: those nodes must serve its share of all requests."""
    rates: dict[str, Mapping[str, float]] = {}  # of the models of a node; equal nodes are measured once
    total = 0.0
    by_model = dict.fromkeys(work.samples, 0.0)
    for node in nodes:
        kind = repr(replace(node, name="", rtt_s=0.0, faults=()))
        if kind not in rates:
            rates[kind] = {
                model: _saturated_rate(node, model, sample)
                for model, sample in work.samples.items()
                if model in node.models
            }
        node_rates = rates[kind]
        if node_rates:
            share = sum(work.shares[model] for model in node_rates)
            total += share / sum(work.shares[model] / rate for model, rate in node_rates.items())
        for model, rate in node_rates.items():
            by_model[model] += rate
    bounds = (rate / work.shares[model] for model, rate in by_model.items() if rate)
    return min((total, *bounds))


def _saturated_rate(node: NodeSpec, model: str, sample: Sequence[tuple[int, int]]) -> float:
    """The requests per second of a node whose slots are always busy with requests like these. A simulated server that
    gets all requests at once measures it. At the end some slots are idle. So the sample is sent several times, and only
    requests that end before the last requests have begun are counted."""
    slots = node.models[model].slots
    server = SimulatedServer(replace(node, loaded=(model,)))
    repeats = max(math.ceil(MIN_SATURATED * slots / len(sample)), 1)
    requests = [pair for _ in range(repeats) for pair in sample]
    for number, (unread_tokens, output_tokens) in enumerate(requests):
        request = SimulatedRequest(number, 0.0, model, unread_tokens, output_tokens)
        server.accept(Attempt(Job(request, 0.0, unread_tokens, output_tokens), "", None), 0.0)
    ended = 0
    now = 0.0
    while server.runners[model].waiting:
        now = server.next_event_at
        server.advance(now)
        ended += len(server.ended)
        server.ended.clear()
    return ended / now


def _turns(request: SimulatedRequest) -> Iterator[SimulatedRequest]:
    """Yields all requests of a conversation, this one first."""
    turn: SimulatedRequest | None = request
    while turn is not None:
        yield turn
        turn = turn.next_turn


class _PooledCache:
    """One cache with the size of all caches of the fleet: its hits are about the most that any routing could reach."""

    def __init__(self, nodes: Sequence[NodeSpec]) -> None:
        self._slots = sum(max((model.slots for model in node.models.values()), default=0) for node in nodes)
        self._tokens = sum(node.cache_tokens + node.lost_tokens for node in nodes)
        self._prompts: OrderedDict[int, tuple[int, ...]] = OrderedDict()  # in the slots, by the id of the last block
        self._holders: dict[int, int] = {}  # by the id of a block: how many of these prompts have it
        self._shared = PrefixCache(0)  # the memory beside the slots

    def use(self, request: SimulatedRequest) -> int:
        """Returns the tokens of the prompt that are in the cache, and puts the prompt into the cache. The prompt must
        have blocks."""
        blocks = request.blocks
        if not self._prompts:
            self._shared = PrefixCache(self._tokens // request.block_tokens)
        cached_count = sum(1 for _ in takewhile(self._holders.__contains__, blocks))
        if cached_count:
            last_cached_block = blocks[cached_count - 1]
            self._forget(last_cached_block)  # if a prompt ends with it, this request continues that prompt
        self._keep(request.end_blocks or blocks)
        while len(self._prompts) > self._slots:
            oldest_prompt = next(iter(self._prompts))
            self._forget(oldest_prompt)
        if self._tokens:
            cached_count = max(cached_count, self._shared.count(blocks))
            self._shared.add(request.end_blocks or blocks)
        return min(cached_count * request.block_tokens, request.prompt_tokens)

    def _keep(self, blocks: tuple[int, ...]) -> None:
        """Puts a prompt with its answer into a slot, as the newest prompt."""
        self._forget(blocks[-1])
        self._prompts[blocks[-1]] = blocks
        for block in blocks:
            self._holders[block] = self._holders.get(block, 0) + 1

    def _forget(self, last_block: int) -> None:
        """Removes the prompt that ends with this block from its slot, if there is such a prompt."""
        for block in self._prompts.pop(last_block, ()):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
