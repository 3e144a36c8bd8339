"""Builds the parts of a node's state that show what the balancer has learned and decided. Pure."""

from __future__ import annotations

from gpumesh.balancer.account import NodeAccount
from gpumesh.mesh.nodes.forecast_record import ForecastRecord
from gpumesh.state import DecisionState, LearnedState, LoadingState, ModelLoadsState
from gpumesh.text.printable import printable

MAX_LEARNED_MODELS = 32  # of one node, in a snapshot
MAX_LOADED_MODELS = 8  # a snapshot names the most often loaded models, at most so many
MAX_CONTEXTS = 8  # of one model
# The window in which the loads are counted is at least so long. Otherwise a single load just now would take 100 % of
# the time.
LEAST_WINDOW_S = 5.0


def learned_states(account: NodeAccount) -> tuple[LearnedState, ...]:
    """The figures of each model that was measured on this node, sorted by name."""
    proven = account.learned_slots.proven_slots() if account.learns_limit else {}
    fixed_slots = account.max_parallel if account.max_parallel is not None else account.reported_parallel
    states: list[LearnedState] = []
    for model, rates in sorted(account.rates.measured().items())[:MAX_LEARNED_MODELS]:
        slots = proven.get(model) if fixed_slots is None else fixed_slots
        states.append(
            LearnedState(
                printable(model),
                _per_second(rates.token_s),
                None if rates.share is None else round(rates.share, 3),
                _per_second(rates.read_token_s),
                None if rates.load_s is None else round(rates.load_s, 2),
                slots,
            )
        )
    return tuple(states)


def _per_second(token_s: float | None) -> float | None:
    """Tokens per second, rounded, from the seconds for one token; ``None`` if these are not known (or 0)."""
    return None if not token_s else round(1.0 / token_s, 1)


def decision_states(record: ForecastRecord, now: float) -> tuple[DecisionState, ...]:
    """The latest requests that the node has answered, the latest first."""
    return tuple(
        DecisionState(
            None if request.key is None else printable(request.key.model),
            round(max(now - request.ended_at, 0.0), 1),
            round(request.forecast.own_s, 3),
            round(request.actual_s, 3),
            request.explain(),
        )
        for request in reversed(record.recent)
    )


def loading_state(record: ForecastRecord, now: float) -> LoadingState | None:
    """How much of the last minutes the node has spent with loads, and of which models; ``None`` if there were none."""
    events = list(record.recent_loads(now))
    if not events:
        return None
    window_s = max(now - min(event.began_at for event in events), LEAST_WINDOW_S)
    counts: dict[str, int] = {}
    contexts: dict[str, dict[int | None, None]] = {}  # by model, an ordered set: in the order of the loads
    for event in events:
        name = event.key.model
        counts[name] = counts.get(name, 0) + 1
        contexts.setdefault(name, {})[event.key.context] = None
    most_loaded_first = sorted(counts, key=lambda name: -counts[name])[:MAX_LOADED_MODELS]
    models = tuple(
        ModelLoadsState(printable(name), counts[name], tuple(contexts[name])[:MAX_CONTEXTS])
        for name in most_loaded_first
    )
    load_s = min(sum(event.seconds_until(now) for event in events), window_s)
    return LoadingState(round(window_s, 1), round(load_s, 1), len(events), models)
