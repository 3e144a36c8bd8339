"""Policies: each ranks the candidates for a demand, the best first. Pure; ties are rotated by ``turn``.

Each is ``(candidates, demand, turn, rng) -> names``. The candidates that it gets can serve and have a free slot.
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

# Used where nothing was measured yet. About those of a 7B model in 4 bits on an RTX 4090; they only rank.
DEFAULT_TOKENS = 256
DEFAULT_RATE = 60.0
DEFAULT_LOAD_S = 6.0
MAX_TOKENS = 1_000_000  # a client may ask for any number, and gets what the model's context has room for
MIN_RATE, MAX_RATE = 1e-3, 1e6
# Streams that run together on one GPU share it: each takes this share longer for each other stream (llama.cpp with four
# slots gives a little over twice the tokens/s of one slot).
SLOWDOWN_PER_STREAM = 0.2
PREFILL_SPEEDUP = 20.0  # prompt tokens are read about twenty times as fast as new tokens are generated


def round_robin(candidates: Sequence[Candidate], _demand: Demand, turn: int, _rng: Random) -> tuple[str, ...]:
    return tuple(candidate.name for candidate in _rotate(candidates, turn))


def least_loaded(candidates: Sequence[Candidate], _demand: Demand, turn: int, _rng: Random) -> tuple[str, ...]:
    """By the requests in flight there, relative to the node's parallelism and its weight."""
    loads = group_loads(candidates)
    ranked = sorted(_rotate(candidates, turn), key=lambda candidate: _relative_load(candidate, loads))
    return tuple(candidate.name for candidate in ranked)


def power_of_two(candidates: Sequence[Candidate], demand: Demand, turn: int, rng: Random) -> tuple[str, ...]:
    """The less loaded of two nodes drawn at random, then the others: many gateways with old figures do not all choose
    the same node.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
    """
    if len(candidates) <= 2:
        return least_loaded(candidates, demand, turn, rng)
    drawn = rng.sample(list(candidates), 2)
    rest = [candidate for candidate in candidates if candidate not in drawn]
    return least_loaded(drawn, demand, turn, rng) + least_loaded(rest, demand, turn, rng)


def adaptive(candidates: Sequence[Candidate], demand: Demand, turn: int, _rng: Random) -> tuple[str, ...]:
    """By the predicted time to finish (``predict_duration_s``)."""
    loads = group_loads(candidates)
    model = full_name(demand.model) if demand.model is not None else None
    measured = [rate for candidate in candidates if (rate := _rate(candidate, model)) is not None]
    # A node that was never measured is taken to be as fast as the best one, so that it is tried and measured.
    unknown_rate = max(measured, default=DEFAULT_RATE)
    ranked = sorted(
        _rotate(candidates, turn),
        key=lambda candidate: (
            round(
                predict_duration_s(
                    candidate, demand, queued_ahead=loads[gpu_group(candidate)], unknown_rate=unknown_rate
                ),
                2,
            ),
            _relative_load(candidate, loads),
        ),
    )
    return tuple(candidate.name for candidate in ranked)


def predict_duration_s(candidate: Candidate, demand: Demand, *, queued_ahead: int, unknown_rate: float) -> float:
    """Seconds until this demand would be done on this node. The sum of:

    - the round trip,
    - waiting for requests ahead, as far as they leave no free slot,
    - loading the model, if it is not in memory,
    - reading the prompt, unless this session's prefix is in the node's cache,
    - generating, slowed down by the streams that run at the same time and by other users of the GPU.

    ``queued_ahead`` counts the requests on the node's GPU; ``unknown_rate`` is used where no tokens/s were measured.
    """
    model = full_name(demand.model) if demand.model is not None else None
    rate = _rate(candidate, model) or unknown_rate
    # nvidia-smi's utilisation is the share of time in which any kernel ran: at 1.0 another program takes about half.
    rate *= (1.0 - 0.5 * min(max(candidate.foreign_load or 0.0, 0.0), 1.0)) * candidate.weight
    tokens = min(demand.max_tokens or DEFAULT_TOKENS, MAX_TOKENS)
    slots = candidate.limit or max(queued_ahead + 1, 1)
    concurrent = min(queued_ahead, slots - 1)
    generating = tokens / rate * (1.0 + SLOWDOWN_PER_STREAM * concurrent)
    waiting = max(queued_ahead - slots + 1, 0) / slots * generating
    loaded = model is None or not candidate.models or model in full_names(candidate.loaded)
    loading = 0.0 if loaded else candidate.load_s.get(model or "", DEFAULT_LOAD_S)
    cached = demand.session is not None and demand.session in candidate.sessions
    reading = 0.0 if cached else (demand.prompt_tokens or 0) / (rate * PREFILL_SPEEDUP)
    return (candidate.rtt_ms or 0.0) / 1000.0 + waiting + loading + reading + generating


def _rate(candidate: Candidate, model: str | None) -> float | None:
    """Measured tokens/s for this model there, else the mean over its models, else ``None``."""
    measured = candidate.tokens_per_s.get(model) if model is not None else None
    rates = [measured] if _is_plausible(measured) else list(filter(_is_plausible, candidate.tokens_per_s.values()))
    return sum(rates) / len(rates) if rates else None


def _is_plausible(rate: float | None) -> TypeGuard[float]:
    """Whether a node can be ranked by this rate. Outside these bounds the ranks of all others would mean nothing, or a
    division would fail."""
    return rate is not None and MIN_RATE <= rate <= MAX_RATE


def _rotate(candidates: Sequence[Candidate], turn: int) -> list[Candidate]:
    """In the order of names, beginning with another one at each turn."""
    ordered = sorted(candidates, key=lambda candidate: candidate.name)
    start = turn % len(ordered) if ordered else 0
    return ordered[start:] + ordered[:start]


def _relative_load(candidate: Candidate, loads: Mapping[str, int]) -> float:
    return loads[gpu_group(candidate)] / ((candidate.limit or 1) * candidate.weight)


POLICIES: Mapping[PolicyKind, Policy] = {
    PolicyKind.ROUND_ROBIN: round_robin,
    PolicyKind.LEAST_LOADED: least_loaded,
    PolicyKind.POWER_OF_TWO: power_of_two,
    PolicyKind.ADAPTIVE: adaptive,
}
