"""Scales the times of a workload, so that its work is a given share of what the fleet can do. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

from gpumesh.bench.simulate.fleet import MeanWork, NodeSpec, fleet_capacity
from gpumesh.bench.simulate.requests import SimulatedRequest
from gpumesh.bench.simulate.servers.prefix_cache import PrefixCache
from gpumesh.bench.simulate.workloads import Workload
from gpumesh.errors import UsageError


def scale_to_load(workload: Workload, nodes: Sequence[NodeSpec], load: float) -> Workload:
    """The workload with its times changed so that its requests come at ``load`` (0.8: 80 %) times the rate that the
    fleet can serve at most (``fleet.fleet_capacity``).

    Which part of a prompt must be read depends on the policy. It counts as read what one cache as large as those of all
    nodes together would not hold. Raises UsageError if no node can serve the workload's models.
    """
    work, offered_rate = measure_work(workload, nodes)
    capacity = fleet_capacity(nodes, work)
    if capacity <= 0:
        raise UsageError("no node of the fleet has a model of the workload")
    return workload.scaled(offered_rate / (load * capacity))


def measure_work(requests: Iterable[SimulatedRequest], nodes: Sequence[NodeSpec]) -> tuple[list[MeanWork], float]:
    """The mean work of each model, and the requests per second from the first to the last arrival. What is read of the
    prompts is as in ``scale_to_load``."""
    cache = _PooledCache(nodes)
    totals: dict[str, list[float]] = {}
    count = 0
    first_at_s: float | None = None
    last_at_s = 0.0
    for first_turn in requests:
        if first_at_s is None:
            first_at_s = first_turn.at_s
        last_at_s = first_turn.at_s
        for request in _turns(first_turn):
            total = totals.setdefault(request.model, [0.0, 0.0, 0.0])
            total[0] += 1
            total[1] += max(request.prompt_tokens - cache.use(request), 1)
            total[2] += request.output_tokens
            count += 1
    if not count:
        raise UsageError("the workload has no requests")
    work = [MeanWork(model, n / count, unread / n, output / n) for model, (n, unread, output) in totals.items()]
    span_s = last_at_s - (first_at_s or 0.0)
    return work, count / span_s if span_s > 0 else float(count)


def _turns(request: SimulatedRequest) -> Iterator[SimulatedRequest]:
    turn: SimulatedRequest | None = request
    while turn is not None:
        yield turn
        turn = turn.next_turn


class _PooledCache:
    """One cache as large as those of all nodes together: about the best that any routing could reach."""

    def __init__(self, nodes: Sequence[NodeSpec]) -> None:
        self._slots = sum(max((model.slots for model in node.models.values()), default=0) for node in nodes)
        self._tokens = sum(node.cache_tokens for node in nodes)
        self._prompts: OrderedDict[int, tuple[int, ...]] = OrderedDict()  # in the slots, by the id of the last block
        self._holders: dict[int, int] = {}  # by the id of a block: how many of these prompts have it
        self._shared = PrefixCache(0)

    def use(self, request: SimulatedRequest) -> int:
        """Returns the tokens of the prompt that are in the cache, and puts the prompt into the cache."""
        blocks = request.blocks
        if not blocks:
            return 0
        if not self._prompts:
            self._shared = PrefixCache(self._tokens // request.block_tokens)
        count = sum(1 for _ in takewhile(self._holders.__contains__, blocks))
        if count:
            self._forget(blocks[count - 1])  # the prompt that this one continues is replaced
        self._keep(request.end_blocks or blocks)
        while len(self._prompts) > self._slots:
            self._forget(next(iter(self._prompts)))
        if self._tokens:
            count = max(count, self._shared.count(blocks))
            self._shared.add(request.end_blocks or blocks)
        return min(count * request.block_tokens, request.prompt_tokens)

    def _keep(self, blocks: tuple[int, ...]) -> None:
        self._forget(blocks[-1])
        self._prompts[blocks[-1]] = blocks
        for block in blocks:
            self._holders[block] = self._holders.get(block, 0) + 1

    def _forget(self, last_block: int) -> None:
        for block in self._prompts.pop(last_block, ()):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
