"""Policies: each ranks the candidates for a demand, the best first. Pure; ties are rotated by ``turn``.

A policy is ``(candidates, demand, turn, rng) -> names``. All its candidates can serve the demand and have a free slot;
``names`` are the names of all candidates, the best first. ``turn`` is a number that grows with each choice of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TypeGuard

from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.select import full_names, gpu_group, group_loads
from gpumesh.model_names import full_name
from gpumesh.topology import PolicyKind

Policy = Callable[[Sequence[Candidate], Demand, int, Random], tuple[str, ...]]

# Used where nothing was measured yet: about the figures of a 7B model in 4 bits on an RTX 4090. They only rank nodes.
DEFAULT_TOKENS = 256
DEFAULT_RATE = 60.0  # tokens/s
DEFAULT_LOAD_S = 6.0  # to load a model into GPU memory
MAX_TOKENS = 1_000_000  # a client may ask for more tokens than any model's context has room for
MIN_RATE, MAX_RATE = 1e-3, 1e6  # tokens/s that a server can plausibly report
# Streams that run together share the GPU. Each other stream makes a stream take this share longer (llama.cpp with four
# slots gives a little over twice the tokens/s of one slot).
SLOWDOWN_PER_STREAM = 0.2
PREFILL_SPEEDUP = 20.0  # prompt tokens are read about twenty times as fast as new tokens are generated


def round_robin(candidates: Sequence[Candidate], _demand: Demand, turn: int, _rng: Random) -> tuple[str, ...]:
    """Ranks by name; each turn begins with the next node."""
    return tuple(candidate.name for candidate in _rotate(candidates, turn))


def least_loaded(candidates: Sequence[Candidate], _demand: Demand, turn: int, _rng: Random) -> tuple[str, ...]:
    """Ranks by the requests in flight on the node's GPU, relative to the node's parallelism and its weight."""
    loads = group_loads(candidates)
    ranked = sorted(_rotate(candidates, turn), key=lambda candidate: _relative_load(candidate, loads))
    return tuple(candidate.name for candidate in ranked)


def power_of_two(candidates: Sequence[Candidate], demand: Demand, turn: int, rng: Random) -> tuple[str, ...]:
    """Ranks two nodes that are drawn at random before all others, and the less loaded of the two first. So many
    gateways that see the same outdated loads do not all choose the same node.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
    """
    if len(candidates) <= 2:
        return least_loaded(candidates, demand, turn, rng)
    drawn = rng.sample(list(candidates), 2)
    rest = [candidate for candidate in candidates if candidate not in drawn]
    return least_loaded(drawn, demand, turn, rng) + least_loaded(rest, demand, turn, rng)


def adaptive(candidates: Sequence[Candidate], demand: Demand, turn: int, _rng: Random) -> tuple[str, ...]:
    """Ranks by the predicted time to finish (``predict_duration_s``), and then as ``least_loaded``."""
    loads = group_loads(candidates)
    model = full_name(demand.model) if demand.model is not None else None
    rates = [_measured_rate(candidate, model) for candidate in candidates]
    # A node that was never measured is taken to be as fast as the best node, so that it is tried and measured.
    unknown_rate = max((rate for rate in rates if rate is not None), default=DEFAULT_RATE)

    def sort_key(candidate: Candidate) -> tuple[float, float]:
        queued_ahead = loads[gpu_group(candidate)]
        seconds = predict_duration_s(candidate, demand, queued_ahead=queued_ahead, unknown_rate=unknown_rate)
        # A difference below 0.01 s is no reason to prefer a node.
        return round(seconds, 2), _relative_load(candidate, loads)

    ranked = sorted(_rotate(candidates, turn), key=sort_key)
    return tuple(candidate.name for candidate in ranked)


def predict_duration_s(candidate: Candidate, demand: Demand, *, queued_ahead: int, unknown_rate: float) -> float:
    """Predicts how many seconds this node would need for this demand. It is the sum of

    - the tunnel's round trip,
    - the wait for the requests ahead, if they take all slots,
    - the load of the model, if it is not in memory,
    - the prefill (reading the prompt), unless this session's prefix is in the node's cache,
    - the generation, slowed down by the streams that run at the same time and by other users of the GPU.

    ``queued_ahead`` counts the requests on the node's GPU, the running ones included. ``unknown_rate`` (tokens/s) is
    used if no rate was measured.
    """
    model = full_name(demand.model) if demand.model is not None else None
    rate = _measured_rate(candidate, model) or unknown_rate
    # nvidia-smi's utilisation is the share of time in which any kernel ran: at 1.0 another program takes about half.
    foreign_load = min(max(candidate.foreign_load or 0.0, 0.0), 1.0)
    rate *= (1.0 - 0.5 * foreign_load) * candidate.weight
    tokens = min(demand.max_tokens or DEFAULT_TOKENS, MAX_TOKENS)
    slots = candidate.limit or max(queued_ahead + 1, 1)  # without a limit, all requests run at the same time
    concurrent = min(queued_ahead, slots - 1)  # the other requests that run at the same time as this one
    generation_s = tokens / rate * (1.0 + SLOWDOWN_PER_STREAM * concurrent)
    # Before this request gets a slot, so many requests must end that ``slots - 1`` of those ahead are left. They are
    # taken to be as long as this request, so ``slots`` of them end in each ``generation_s``.
    wait_s = max(queued_ahead - slots + 1, 0) / slots * generation_s
    load_s = 0.0
    # The node loads the model if the request names one that is not in memory. A server that lists no models is the
    # exception: it serves whatever it has loaded, so it loads nothing.
    if model is not None and candidate.models and model not in full_names(candidate.loaded):
        load_s = candidate.load_s.get(model, DEFAULT_LOAD_S)
    is_cached = demand.session is not None and demand.session in candidate.sessions
    prefill_s = 0.0 if is_cached else (demand.prompt_tokens or 0) / (rate * PREFILL_SPEEDUP)
    round_trip_s = (candidate.rtt_ms or 0.0) / 1000.0
    return round_trip_s + wait_s + load_s + prefill_s + generation_s


def _measured_rate(candidate: Candidate, model: str | None) -> float | None:
    """The measured tokens/s of this model on this node. If there is none, the mean over the node's other models, or
    ``None`` if nothing was measured there. ``model`` is a full name."""
    model_rate = candidate.tokens_per_s.get(model) if model is not None else None
    if _is_plausible(model_rate):
        return model_rate
    rates = [rate for rate in candidate.tokens_per_s.values() if _is_plausible(rate)]
    return sum(rates) / len(rates) if rates else None


def _is_plausible(rate: float | None) -> TypeGuard[float]:
    """Whether nodes can be ranked by this rate (tokens/s). A rate outside the bounds would make the ranks of all other
    nodes meaningless, or a division would fail."""
    return rate is not None and MIN_RATE <= rate <= MAX_RATE


def _rotate(candidates: Sequence[Candidate], turn: int) -> list[Candidate]:
    """Sorts the candidates by name, and then rotates the list: each turn begins with the next candidate."""
    ordered = sorted(candidates, key=lambda candidate: candidate.name)
    start = turn % len(ordered) if ordered else 0  # without candidates, % would divide by 0
    return ordered[start:] + ordered[:start]


def _relative_load(candidate: Candidate, loads: Mapping[str, int]) -> float:
    """The requests in flight per slot on the node's GPU, divided by the node's weight. ``loads``: the requests in
    flight by GPU group. A node without a limit counts as one with a single slot."""
    return loads[gpu_group(candidate)] / ((candidate.limit or 1) * candidate.weight)


POLICIES: Mapping[PolicyKind, Policy] = {
    PolicyKind.ROUND_ROBIN: round_robin,
    PolicyKind.LEAST_LOADED: least_loaded,
    PolicyKind.POWER_OF_TWO: power_of_two,
    PolicyKind.ADAPTIVE: adaptive,
}
