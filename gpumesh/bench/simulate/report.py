"""The result of a simulation as values, as JSON (``gpumesh.simulation/1``), and as an HTML page with plots. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpumesh import __version__
from gpumesh.bench.report import svg
from gpumesh.bench.report.html_parts import escape_text, html_table
from gpumesh.bench.report.page import html_page
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.simulate.fleet import NodeSpec
from gpumesh.bench.simulate.measures import PolicyResult
from gpumesh.wire import to_json

SIMULATION_SCHEMA = "gpumesh.simulation/1"


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """The same workload under several policies. ``workload`` says in words what was sent, ``requests`` how many.
    ``offered_per_s``: the requests per second that came; ``capacity_per_s``: those that the fleet can serve at most."""

    workload: str
    seed: int
    requests: int
    offered_per_s: float
    capacity_per_s: float
    nodes: tuple[NodeSpec, ...]
    policies: tuple[PolicyResult, ...]


def simulation_json(result: SimulationResult) -> dict[str, Any]:
    """The comparison as a JSON document. Times are in seconds."""
    document = {"schema": SIMULATION_SCHEMA, "gpumesh": __version__, **to_json(result)}
    for policy, values in zip(result.policies, document["policies"], strict=True):
        values["read_share"] = policy.read_share
    return document


def simulation_html(result: SimulationResult) -> str:
    """A page of its own, without scripts or network."""
    title = "gpumesh bench simulate"
    ranges = [
        (
            "Completion, by policy",
            [_summary_range(policy.policy, policy.completion) for policy in result.policies],
        ),
        ("Time to first token, by policy", [_summary_range(policy.policy, policy.ttft) for policy in result.policies]),
    ]
    body = [
        f"<h1>{escape_text(title)}</h1>",
        f'<p class="sub">{escape_text(result.workload)}; {result.requests:,} requests, '
        f"{format_number(result.offered_per_s)} a second of {format_number(result.capacity_per_s)} "
        f"that {len(result.nodes)} nodes can serve; gpumesh {escape_text(__version__)}</p>",
        html_table(FIGURE_NAMES, [[escape_text(cell) for cell in figures(policy)] for policy in result.policies]),
        *(svg.draw_ranges(name, rows, "s") for name, rows in ranges),
        *(
            svg.draw_bars(f"Requests served by node: {policy.policy}", _node_bars(policy), "")
            for policy in result.policies
        ),
    ]
    return html_page(title, body)


def _summary_range(label: str, summary: Any) -> svg.Range:
    return svg.Range(label, (("p50", summary.p50), ("p90", summary.p90), ("p99", summary.p99)))


def _node_bars(policy: PolicyResult) -> Sequence[svg.Bar]:
    return [svg.Bar(node.name, float(node.served)) for node in policy.nodes]


FIGURE_NAMES = (
    "policy",
    "mean s",
    "p50 s",
    "p90 s",
    "p99 s",
    "TTFT p50 s",
    "TTFT p99 s",
    "wait s",
    "loads",
    "read",
    "lost",
)


def figures(policy: PolicyResult) -> list[str]:
    """The figures of a policy as texts, in the order of ``FIGURE_NAMES``. ``wait s`` is the mean wait in the gateway's
    queue; ``read`` the share of the prompts' tokens that the servers had to read."""
    return [
        policy.policy,
        format_number(policy.completion.mean),
        format_number(policy.completion.p50),
        format_number(policy.completion.p90),
        format_number(policy.completion.p99),
        format_number(policy.ttft.p50),
        format_number(policy.ttft.p99),
        format_number(policy.queue_wait.mean),
        str(policy.loads),
        "–" if policy.read_share is None else f"{policy.read_share:.0%}",  # noqa: RUF001  # the dash of the tables
        str(policy.lost),
    ]
