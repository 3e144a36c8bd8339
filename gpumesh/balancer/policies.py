"""Policies: a snapshot of candidates and a demand to a ranking, best first. Pure; ties are rotated by ``turn``.

Each is ``(candidates, demand, turn, rng) -> names``; the candidates given are those that may serve, with a free place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TypeGuard

from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.select import full_name, full_names, gpu_group, group_loads
from gpumesh.topology import PolicyKind

Policy = Callable[[Sequence[Candidate], Demand, int, Random], tuple[str, ...]]

# Where nothing was measured yet. The order of size is that of a 7B model in 4 bits on a 4090; they only rank.
DEFAULT_TOKENS = 256
DEFAULT_RATE = 60.0
DEFAULT_LOAD_S = 6.0
MOST_TOKENS = 1_000_000  # a client may ask for as many as it likes, and gets what the model's context has room for
SLOWEST_RATE, FASTEST_RATE = 1e-3, 1e6
# Streams that run together on one GPU share it: each takes so much longer for each that runs beside it (llama.cpp with
# four slots gives a little over twice the tokens/s of one).
NEIGHBOUR_SHARE = 0.2
PREFILL_PER_GENERATED = 20.0  # prompt tokens are read some twenty times as fast as new ones are made


def round_robin(candidates: Sequence[Candidate], _demand: Demand, turn: int, _rng: Random) -> tuple[str, ...]:
    return tuple(candidate.name for candidate in _rotated(candidates, turn))


def least_loaded(candidates: Sequence[Candidate], _demand: Demand, turn: int, _rng: Random) -> tuple[str, ...]:
    """By what is in flight there, relative to what the node can run in parallel and to its weight."""
    loads = group_loads(candidates)
    ranked = sorted(_rotated(candidates, turn), key=lambda candidate: _pressure(candidate, loads))
    return tuple(candidate.name for candidate in ranked)


def power_of_two(candidates: Sequence[Candidate], demand: Demand, turn: int, rng: Random) -> tuple[str, ...]:
    """The better of two drawn at random, then the others: a herd of gateways with old figures does not pile up.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
    """
    if len(candidates) <= 2:
        return least_loaded(candidates, demand, turn, rng)
    drawn = rng.sample(list(candidates), 2)
    rest = [candidate for candidate in candidates if candidate not in drawn]
    return least_loaded(drawn, demand, turn, rng) + least_loaded(rest, demand, turn, rng)


def adaptive(candidates: Sequence[Candidate], demand: Demand, turn: int, _rng: Random) -> tuple[str, ...]:
    """By the predicted time to finish; see ``predict_duration_s``."""
    loads = group_loads(candidates)
    model = full_name(demand.model) if demand.model is not None else None
    known = [rate for candidate in candidates if (rate := _rate(candidate, model)) is not None]
    # Who was never measured is taken to be as fast as the best: it gets tried, and then it is known.
    optimistic = max(known, default=DEFAULT_RATE)
    ranked = sorted(
        _rotated(candidates, turn),
        key=lambda candidate: (
            round(
                predict_duration_s(
                    candidate, demand, queued_ahead=loads[gpu_group(candidate)], unknown_rate=optimistic
                ),
                2,
            ),
            _pressure(candidate, loads),
        ),
    )
    return tuple(candidate.name for candidate in ranked)


def predict_duration_s(candidate: Candidate, demand: Demand, *, queued_ahead: int, unknown_rate: float) -> float:
    """Seconds until this demand would be done on this node.

    round trip + waiting for those ahead that leave no free place + loading the model if it is not in memory + reading
    the prompt (not if this session's prefix is in the node's cache) + generating, slowed by what runs beside it and by
    who else uses the GPU.
    """
    model = full_name(demand.model) if demand.model is not None else None
    rate = _rate(candidate, model) or unknown_rate
    # nvidia-smi's utilisation is the share of time in which any kernel ran: at 1.0 a rival takes about half.
    rate *= (1.0 - 0.5 * min(max(candidate.foreign_load or 0.0, 0.0), 1.0)) * candidate.weight
    tokens = min(demand.max_tokens or DEFAULT_TOKENS, MOST_TOKENS)
    slots = candidate.limit or max(queued_ahead + 1, 1)
    beside = min(queued_ahead, slots - 1)
    service = tokens / rate * (1.0 + NEIGHBOUR_SHARE * beside)
    waiting = max(queued_ahead - slots + 1, 0) / slots * service
    loaded = model is None or not candidate.models or model in full_names(candidate.loaded)
    loading = 0.0 if loaded else candidate.load_s.get(model or "", DEFAULT_LOAD_S)
    cached = demand.session is not None and demand.session in candidate.sessions
    reading = 0.0 if cached else (demand.prompt_tokens or 0) / (rate * PREFILL_PER_GENERATED)
    return (candidate.rtt_ms or 0.0) / 1000.0 + waiting + loading + reading + service


def _rate(candidate: Candidate, model: str | None) -> float | None:
    """Measured tokens/s for this model there, else the mean over its models, else ``None``."""
    measured = candidate.tokens_per_s.get(model) if model is not None else None
    rates = [measured] if _believed(measured) else list(filter(_believed, candidate.tokens_per_s.values()))
    return sum(rates) / len(rates) if rates else None


def _believed(rate: float | None) -> TypeGuard[float]:
    """Whether a node can be ranked by it: what is outside makes ranks of all others meaningless, or a division fail."""
    return rate is not None and SLOWEST_RATE <= rate <= FASTEST_RATE


def _rotated(candidates: Sequence[Candidate], turn: int) -> list[Candidate]:
    ordered = sorted(candidates, key=lambda candidate: candidate.name)
    start = turn % len(ordered) if ordered else 0
    return ordered[start:] + ordered[:start]


def _pressure(candidate: Candidate, loads: Mapping[str, int]) -> float:
    return loads[gpu_group(candidate)] / ((candidate.limit or 1) * candidate.weight)


POLICIES: Mapping[PolicyKind, Policy] = {
    PolicyKind.ROUND_ROBIN: round_robin,
    PolicyKind.LEAST_LOADED: least_loaded,
    PolicyKind.POWER_OF_TWO: power_of_two,
    PolicyKind.ADAPTIVE: adaptive,
}
