"""The result of a benchmark as values, and as JSON: the document ``gpumesh.bench/1`` and the line for each request.

Pure. ``result_folder`` writes and reads the files.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from gpumesh import __version__
from gpumesh.bench.figures.answers.answer import Answer, read_answers
from gpumesh.bench.figures.capacity import NodeCapacity
from gpumesh.bench.figures.cost import NO_PRICES, Prices, StageCost
from gpumesh.bench.figures.knee import Knee
from gpumesh.bench.figures.node_shares import ColdStart
from gpumesh.bench.figures.outages.failover import FailoverFigures
from gpumesh.bench.figures.routes.route_costs import RouteCost
from gpumesh.bench.figures.routes.route_differences import RouteDifference
from gpumesh.bench.figures.scaling import Scaling
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.load.conditions import Via
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.settings import BenchSettings, Scenario
from gpumesh.state import MeshState, NodeState
from gpumesh.wire import from_json, to_json

BENCH_SCHEMA = "gpumesh.bench/1"


@dataclass(frozen=True, slots=True)
class NodeEnvironment:
    """A node as it was when the run ended.

    ``backend`` is the kind of its server, ``version`` the server's version. ``gpus`` are the names of its GPUs,
    ``None`` if nvidia-smi gave no answer. ``parallel`` is the number of requests that its server runs at once,
    ``None`` if unknown. ``eur_per_hour`` is its rent, ``None`` if mesh.yaml does not tell it. ``measured``: whether
    requests were sent to it; a node that was down, or without the model, was not measured.
    """

    name: str
    transport: str
    rtt_ms: float | None
    backend: str
    version: str | None
    gpus: tuple[str, ...] | None
    driver: str | None
    parallel: int | None
    simulated: bool
    eur_per_hour: float | None = None
    measured: bool = True


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and with which software and hardware a run was measured. Results are comparable only if these values agree.

    ``gpumesh`` and ``python`` are versions, ``platform`` and ``cpus`` describe the measuring machine, ``mesh`` is the
    mesh's name.
    """

    gpumesh: str
    python: str
    platform: str
    cpus: int | None
    mesh: str
    embedded: bool
    """Whether the mesh ran in the measuring process. Otherwise the mesh ran already, reached by its control socket."""
    nodes: tuple[NodeEnvironment, ...]
    via: Via | None = None
    """On which way the requests went to the nodes; ``None`` in results of older versions."""
    url: str | None = None
    """The server that was measured, if it belongs to no mesh."""


@dataclass(frozen=True, slots=True)
class BenchResult:
    """The result of a run. ``at`` is the time of its start; ``notes`` are sentences that qualify the figures.

    ``partial``: the run has not come to its end, so stages may be missing and the last stage may be partial itself.
    ``partial_reason`` says what ended it. A partial result without a reason is of a run that still goes on, or that was
    killed.

    ``capacity`` is that of each node, if the scenario has found it first (empty: it has not). ``knee`` is that of a
    sweep.

    ``cold_starts`` are the answers, those of the warm-up too, that waited until their model was in memory.

    ``runs`` has the result of each run if the same scenario was run several times; empty for a single run. Then the
    figures here are those of all runs together (``joint.join_runs``).
    """

    at: datetime
    scenario: Scenario
    settings: BenchSettings
    objective: Objective
    environment: Environment
    stages: tuple[StageResult, ...]
    scaling: Scaling | None = None
    routes: tuple[RouteCost, ...] = ()
    route_differences: tuple[RouteDifference, ...] = ()
    failover: FailoverFigures | None = None
    notes: tuple[str, ...] = ()
    capacity: tuple[NodeCapacity, ...] = ()
    knee: Knee | None = None
    partial: bool = False
    partial_reason: str | None = None
    runs: tuple[BenchResult, ...] = ()
    cold_starts: tuple[ColdStart, ...] = ()
    costs: tuple[StageCost, ...] = ()

    def end_early(self, reason: str) -> BenchResult:
        """This result, of a run that was ended for this reason before its end."""
        return replace(self, partial=True, partial_reason=reason)

    @property
    def simulated(self) -> bool:
        """Whether a measured host was simulated: then the figures are not those of a GPU."""
        return any(node.simulated for node in self.environment.nodes)

    @property
    def failed(self) -> int:
        """The number of requests that failed or whose answer was cut."""
        return sum(stage.failed + stage.cut for stage in self.stages)


def describe_environment(
    state: MeshState,
    *,
    embedded: bool,
    via: Via | None = None,
    url: str | None = None,
    measured: Container[str] | None = None,
    prices: Prices = NO_PRICES,
) -> Environment:
    """Describes this machine and the mesh's nodes as they are now. The other arguments: see ``Environment``.

    ``measured``: the names of the nodes to which requests were sent, ``None`` for all.
    """
    return Environment(
        gpumesh=__version__,
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        cpus=os.cpu_count(),
        mesh=state.mesh,
        embedded=embedded,
        via=via,
        url=url,
        nodes=tuple(
            replace(
                _node_environment(node),
                eur_per_hour=prices.eur_per_hour.get(node.name),
                measured=measured is None or node.name in measured,
            )
            for node in state.nodes
        ),
    )


def _node_environment(node: NodeState) -> NodeEnvironment:
    """Describes a node as it is now."""
    return NodeEnvironment(
        name=node.name,
        transport=node.tunnel.transport,
        rtt_ms=node.tunnel.rtt_ms,
        backend=node.backend.kind,
        version=node.backend.version,
        gpus=None if node.gpus is None else tuple(gpu.name for gpu in node.gpus),
        driver=node.host.driver,
        parallel=node.load.limit,
        simulated=node.simulated,
    )


def result_json(result: BenchResult) -> dict[str, Any]:
    """Converts a result into the document of ``result.json``."""
    return {"schema": BENCH_SCHEMA, **to_json(result)}


def result_text(result: BenchResult) -> str:
    """The text of ``result.json``."""
    return f"{json.dumps(result_json(result), indent=1, allow_nan=False)}\n"


def result_from_json(document: object) -> BenchResult:
    """Reads the result from a document of ``result.json``.

    Raises ``ValueError`` when the document is not of the schema ``gpumesh.bench/1``.
    """
    if not isinstance(document, Mapping):
        raise ValueError("not an object")  # noqa: TRY004 - every fault of a document is a ValueError
    if document.get("schema") != BENCH_SCHEMA:
        raise ValueError(f"its schema is {document.get('schema')!r}, not {BENCH_SCHEMA!r}")
    try:
        return from_json(BenchResult, document)
    except (TypeError, KeyError, AttributeError) as error:
        # ``from_json`` should raise only ValueError. If it meets a document for which it was not made, the document is
        # at fault all the same.
        raise ValueError(str(error)) from error


def records_json(records: Sequence[LoadSample]) -> list[dict[str, Any]]:
    """Converts the outcome of each request into its line of ``requests.jsonl``: sizes and times, no text.

    ``server`` has the server's figures as the server gave them, the other members only figures that are believed.
    """
    return [_answer_json(record, answer) for record, answer in zip(records, read_answers(records), strict=True)]


def _answer_json(record: LoadSample, answer: Answer) -> dict[str, Any]:
    """The line of a request. ``record`` has the server's figures as the server gave them."""
    return {
        "stage": record.stage,
        "index": record.index,
        "route": record.route,
        "node": record.node,
        "first_node": record.first_node,
        "attempts": record.attempts,
        "outcome": record.outcome.value,
        "intended_s": round(record.intended_s, 6),
        "sent_s": round(record.sent_s, 6),
        "ended_s": round(record.ended_s, 6),
        "ttft_ms": _round(record.ttft_ms),
        "tpot_ms": _round(answer.tpot_ms),
        "tpot_source": None if answer.tpot_source is None else answer.tpot_source.value,
        "end_to_end_ms": _round(record.end_to_end_ms),
        "prompt_tokens": record.prompt_tokens,
        "tokens": answer.tokens,
        "pieces": answer.pieces,
        "tokens_per_s": _round(answer.counters.tokens_per_s),
        "contradicted": answer.contradicted,
        "server": to_json(record.counters),
        "done_reason": record.done_reason,
        "error_code": record.error_code,
        "error": record.error,
        "arrivals_s": [round(arrival_s, 6) for arrival_s in record.arrivals_s],
    }


def _round(value: float | None) -> float | None:
    """Rounds to three digits after the point."""
    return None if value is None else round(value, 3)
