"""Explains a placement in one line: what the request was forecast to cost on its node, and on the other nodes. Pure.

::

    iceland 1.2 s = 0.06 way + 0.0 wait + 0.3 read 1,100 of 4,200 + 0.8 write; vengeance 6.9 s = load qwen2.5:14b,
    pushes out llama3.1:8b

The line is printable ASCII, because it stands in a header. Each number without a unit is in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType

from gpumesh.balancer.base import ResidencyKey
from gpumesh.balancer.forecast import Forecast
from gpumesh.balancer.scheduling.scheduler import Placement
from gpumesh.text.printable import printable
from gpumesh.text.sentences import join_some
from gpumesh.topology import PolicyKind

# The explanation of a request that costs no inference: there is no forecast.
NO_PLACEMENT = "it needs no slot, so the least busy node that can answer is asked"
MAX_LINE_CHARS = 1000  # servers and proxies take headers of some kilobytes; this leaves room for the others
MAX_NAME_CHARS = 60  # of a node or a model
MAX_PUSHED_OUT = 2  # models that are named; the others are counted
# For a node that was not chosen, only parts of at least this share of its cost are shown: they are the reason.
MAIN_SHARE = 0.25
# The parts of every answer (way, wait, read, write) are always shown. The other parts are shown if they take at least
# this time.
LEAST_SHOWN_S = 0.005
MOST_SHOWN = 999_999.0  # a larger number is shown as this number, so that its length is bounded

Part = tuple[float, str]
"""Seconds, and what they are for."""

NO_TIERS: Mapping[str, int] = MappingProxyType({})


def explain_placement(
    placement: Placement,
    *,
    policy: PolicyKind,
    queue_s: float = 0.0,
    failed_attempts: int = 0,
    tiers: Mapping[str, int] = NO_TIERS,
    pinned: AbstractSet[str] = frozenset(),
) -> str:
    """One line of at most ``MAX_LINE_CHARS`` characters. The chosen node comes first, with all parts of its
    cost. Then come the other nodes in the order of their cost, each with its main parts.

    ``queue_s``: how long the request waited in the gateway's queue. ``failed_attempts``: the earlier attempts of the
    same request, on any node. ``tiers``: those of mesh.yaml, by node. ``pinned``: the full names of the models that
    mesh.yaml pins.
    """
    demand, work = placement.placed.demand, placement.placed.work
    chosen = placement.forecast
    ranks = _describe_ranks([forecast.node for forecast in placement.considered], demand.preferred_nodes, tiers)
    parts = _forecast_parts(chosen, demand.residency, work.prompt_tokens, pinned)
    entry = _describe_node(chosen, parts, ranks)
    notes = "".join(f"; {note}" for note in _notes(policy, queue_s, failed_attempts))
    line = entry + notes
    others = [considered for considered in placement.considered if considered.node != chosen.node]
    others.sort(key=lambda other: other.total_s)
    for position, other in enumerate(others):
        parts = _forecast_parts(other, demand.residency, work.prompt_tokens, pinned)
        entry = f"; {_describe_node(other, _main_parts(parts, other.total_s), ranks)}"
        ending = f"; and {len(others) - position - 1:,} more"
        if len(line) + len(entry) + len(ending) > MAX_LINE_CHARS:
            return f"{line}; and {len(others) - position:,} more"
        line += entry
    return line


def describe_forecast(forecast: Forecast, key: ResidencyKey | None, prompt_tokens: float) -> str:
    """The parts of a forecast as a sum, without the node: ``0.06 way + 0.0 wait + 0.3 read 1,100 of 4,200 + 0.8
    write``."""
    return _render_parts(_forecast_parts(forecast, key, prompt_tokens))


def _notes(policy: PolicyKind, queue_s: float, failed_attempts: int) -> Iterator[str]:
    """Further reasons for the choice of the node, besides the forecasts."""
    if queue_s >= LEAST_SHOWN_S:
        yield f"waited {_number(queue_s)} s in the queue before"
    if failed_attempts:
        yield f"after {failed_attempts:,} failed {'attempt' if failed_attempts == 1 else 'attempts'}"
    if policy is not PolicyKind.ADAPTIVE:
        yield f"chosen by {policy.value}, which does not look at it"


def _describe_ranks(nodes: Sequence[str], preferred: AbstractSet[str], tiers: Mapping[str, int]) -> Mapping[str, str]:
    """By node, what mesh.yaml says of its rank: it may be why a node was chosen that is not the cheapest. Empty if all
    these nodes have the same rank."""
    texts = {node: "preferred" if node in preferred else f"tier {tiers.get(node, 1)}" for node in nodes}
    return texts if len(set(texts.values())) > 1 else {}


def _describe_node(forecast: Forecast, parts: Sequence[Part], ranks: Mapping[str, str]) -> str:
    rank = ranks.get(forecast.node)
    note = "" if rank is None else f" ({rank})"
    return f"{safe_name(forecast.node)}{note} {_number(forecast.total_s)} s = {_render_parts(parts)}"


def _forecast_parts(
    forecast: Forecast, key: ResidencyKey | None, prompt_tokens: float, pinned: AbstractSet[str] = frozenset()
) -> list[Part]:
    """The parts of the cost, in the order in which they happen. Their sum is the forecast's total."""
    read = "read"
    if prompt_tokens > 0.0:
        unread = min(forecast.unread_tokens, prompt_tokens)
        read = f"read {_count(unread)} of {_count(prompt_tokens)}"
    parts: list[Part] = [(forecast.way_s, "way"), (forecast.wait_s, "wait")]
    if forecast.load_s >= LEAST_SHOWN_S:
        parts.append((forecast.load_s, _describe_load(forecast, key)))
    parts += [(forecast.read_s, read), (forecast.write_s, "write")]
    if forecast.others_s >= LEAST_SHOWN_S:
        parts.append((forecast.others_s, "delay of others"))
    if forecast.evicted_s >= LEAST_SHOWN_S:
        pushed_out_pins = [safe_name(model) for model in forecast.pushed_out if model in pinned]
        of_pin = f" of pinned {pushed_out_pins[0]}" if pushed_out_pins else ""
        parts.append((forecast.evicted_s, f"reloads later{of_pin}"))
    return parts


def _describe_load(forecast: Forecast, key: ResidencyKey | None) -> str:
    """``load MODEL``, with the models that it pushes out. A model that is in memory with another context must be loaded
    again: then the new context is shown."""
    if key is None:
        return "load"
    text = f"load {safe_name(key.model)}"
    if key.model in forecast.pushed_out:
        text += " anew" if key.context is None else f" anew with num_ctx {_count(key.context)}"
    others = [safe_name(model) for model in forecast.pushed_out if model != key.model]
    return f"{text}, pushes out {join_some(others, MAX_PUSHED_OUT)}" if others else text


def _main_parts(parts: Sequence[Part], total_s: float) -> Sequence[Part]:
    """The parts that are the reason for the cost; all parts if none is large."""
    return [part for part in parts if part[0] >= MAIN_SHARE * total_s] or parts


def _render_parts(parts: Sequence[Part]) -> str:
    """The sum of the parts. A single part needs no number: the total has it."""
    if len(parts) == 1:
        return parts[0][1]
    return " + ".join(f"{_number(seconds)} {purpose}" for seconds, purpose in parts)


def safe_name(name: str) -> str:
    """A name that may come from a host or a client, as printable ASCII of bounded length."""
    text = printable(name, MAX_NAME_CHARS * 2).encode("ascii", "replace").decode()
    return text if len(text) <= MAX_NAME_CHARS else f"{text[: MAX_NAME_CHARS - 3]}..."


def _number(seconds: float) -> str:
    """The seconds with two decimals below 0.1 s, otherwise with one. A forecast is not exact enough for more."""
    if not math.isfinite(seconds):
        return "?"
    seconds = min(max(seconds, -MOST_SHOWN), MOST_SHOWN)
    return f"{seconds:.2f}" if LEAST_SHOWN_S <= seconds < 0.095 else f"{seconds:,.1f}"


def _count(tokens: float) -> str:
    return f"{min(max(tokens, 0.0), MOST_SHOWN):,.0f}" if math.isfinite(tokens) else "?"
