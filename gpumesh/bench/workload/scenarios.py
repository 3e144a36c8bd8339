"""The benchmark's scenarios (quick, sweep, scale, overhead, failover, replay): plans their stages and requests. Pure.

The plan is complete before the first request is sent. Every prompt begins with a nonce, so that no server answers from
its prefix cache. In ``replay`` all prompts begin with the nonce of the run, so that they still share the prefixes that
they share in the trace. ``think`` is sent with each request (by default false), because Ollama's default is true for
models that can think. The temperature is 0 and the seed is fixed, so that runs can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from gpumesh.bench.workload.prompts import PromptFactory
from gpumesh.bench.workload.settings import MAX_PROMPT_TOKENS, BenchSettings, Scenario
from gpumesh.bench.workload.stages import PlannedRequest, Stage, StageKind
from gpumesh.bench.workload.traces import TracedRequest
from gpumesh.errors import UsageError


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node that a scenario may use. ``parallel``: how many requests it runs at once, if that is known."""

    name: str
    parallel: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages of a run, in order. The first stage is the warm-up."""

    scenario: Scenario
    settings: BenchSettings
    stages: tuple[Stage, ...]

    @property
    def total(self) -> int:
        """The number of requests of all stages."""
        return sum(len(stage.requests) for stage in self.stages)


def plan_stages(
    scenario: Scenario,
    settings: BenchSettings,
    nodes: Sequence[NodeFacts],
    *,
    rng: Random,
    trace: Sequence[TracedRequest] = (),
    routes: int = 1,
) -> Plan:
    """Plans all requests of a scenario on these nodes. The first stage is the warm-up: a short request to each node.

    ``trace`` is for ``replay`` only; ``routes`` is the number of routes over which ``overhead`` sends. Raises
    UsageError when the scenario cannot be run on these nodes or with these settings.
    """
    _check_settings(settings)
    if not nodes:
        raise UsageError(f"no node that is up has the model {settings.model!r}", hint="`gpumesh status` shows why")
    prompts = PromptFactory(settings, rng)
    warm_up_requests = [PlannedRequest(prompts.make_prompt(tokens=1), node.name) for node in nodes]
    warm_up = _make_stage("warm-up", StageKind.WARM_UP, warm_up_requests, concurrency=1)
    match scenario:
        case Scenario.QUICK:
            stages = _plan_quick(settings, prompts, nodes)
        case Scenario.SWEEP:
            stages = _plan_sweep(settings, prompts)
        case Scenario.SCALE:
            stages = _plan_scale(settings, prompts, nodes)
        case Scenario.OVERHEAD:
            stages = _plan_overhead(settings, prompts, nodes, routes)
        case Scenario.FAILOVER:
            stages = _plan_failover(settings, prompts, nodes)
        case Scenario.REPLAY:
            stages = _plan_replay(settings, prompts, trace)
    return Plan(scenario, settings, (warm_up, *stages))


def _check_settings(settings: BenchSettings) -> None:
    """Raises UsageError for a value that makes no sense. The error names the option of `bench run`."""
    for option, value in (
        ("-n", settings.requests),
        ("--tokens", settings.tokens),
        ("--prompt-tokens", settings.prompt_tokens),
        ("-c", min(settings.concurrency, default=None)),  # the smallest level; the other levels are larger
    ):
        if value is not None and value < 1:  # ``None``: not given, so the scenario's default is used
            raise UsageError(f"{option} must be at least 1, not {value}")
    if settings.speed <= 0:
        raise UsageError(f"--speed must be more than 0, not {settings.speed:g}")
    if settings.prompt_tokens > MAX_PROMPT_TOKENS:
        raise UsageError(f"--prompt-tokens can be {MAX_PROMPT_TOKENS} at most, not {settings.prompt_tokens}")


def _make_stage(
    name: str,
    kind: StageKind,
    requests: Sequence[PlannedRequest],
    concurrency: int | None,
    *,
    node: str | None = None,
    disturb: bool = False,
) -> Stage:
    """Makes a stage of these requests. Without ``concurrency``, it is an open loop. The rest is as in ``Stage``."""
    return Stage(name, kind, tuple(requests), node=node, concurrency=concurrency, disturb=disturb)


def _make_node_stage(prompts: PromptFactory, node: NodeFacts, count: int, concurrency: int) -> Stage:
    """A stage of ``count`` requests to one node, ``concurrency`` at a time."""
    requests = [PlannedRequest(prompts.make_prompt(), node.name) for _ in range(count)]
    return _make_stage(node.name, StageKind.NODE, requests, concurrency, node=node.name)


def _make_mesh_stage(
    name: str, prompts: PromptFactory, count: int, concurrency: int, *, disturb: bool = False
) -> Stage:
    """A stage of ``count`` requests to the mesh, ``concurrency`` at a time. ``disturb``: see ``Stage``."""
    requests = [PlannedRequest(prompts.make_prompt()) for _ in range(count)]
    return _make_stage(name, StageKind.MESH, requests, concurrency, disturb=disturb)


def _plan_quick(settings: BenchSettings, prompts: PromptFactory, nodes: Sequence[NodeFacts]) -> list[Stage]:
    """Each node alone with one request at a time, then all nodes together, by default with one request per node."""
    count = settings.requests or 10  # ten are enough for a p90 (``stats.supports_percentile``)
    level = settings.concurrency[0] if settings.concurrency else len(nodes)
    node_stages = [_make_node_stage(prompts, node, count, concurrency=1) for node in nodes]
    return [*node_stages, _make_mesh_stage("mesh", prompts, count * len(nodes), level)]


def _plan_sweep(settings: BenchSettings, prompts: PromptFactory) -> list[Stage]:
    """The mesh at rising concurrency: shows where throughput stops growing, and the latency at that point."""
    stages: list[Stage] = []
    for level in settings.concurrency or (1, 2, 4, 8):
        # At least ten requests, which are enough for a p90, and three rounds: in the first round and in the last, not
        # all slots are taken all the time.
        count = max(settings.requests or 0, 10, 3 * level)
        stages.append(_make_mesh_stage(f"c={level}", prompts, count, level))
    return stages


def _plan_scale(settings: BenchSettings, prompts: PromptFactory, nodes: Sequence[NodeFacts]) -> list[Stage]:
    """Each node alone at its full load, then the mesh at the sum of the loads. Efficiency is mesh ÷ sum of nodes."""
    stages = []
    total_level = 0
    for node in nodes:
        # By default the full load: as many requests as the node runs at once; 1 if that is unknown.
        level = settings.concurrency[0] if settings.concurrency else node.parallel or 1
        total_level += level
        node_count = max(settings.requests or 10, 3 * level)  # at least three rounds, as in ``_plan_sweep``
        stages.append(_make_node_stage(prompts, node, node_count, level))
    total_count = sum(len(stage.requests) for stage in stages)
    return [*stages, _make_mesh_stage("mesh", prompts, total_count, total_level)]


def _plan_overhead(
    settings: BenchSettings, prompts: PromptFactory, nodes: Sequence[NodeFacts], routes: int
) -> list[Stage]:
    """A stage for each node: answers of one token, one at a time, so that the overhead of the routes dominates.

    ``routes`` is the number of routes, which take turns. ``settings.requests`` is the number for each route.
    """
    count = (settings.requests or 50) * routes
    stages: list[Stage] = []
    for node in nodes:
        requests = [PlannedRequest(prompts.make_prompt(tokens=1, prompt_tokens=1), node.name) for _ in range(count)]
        stages.append(_make_stage(node.name, StageKind.NODE, requests, concurrency=1, node=node.name))
    return stages


def _plan_failover(settings: BenchSettings, prompts: PromptFactory, nodes: Sequence[NodeFacts]) -> list[Stage]:
    """A steady load. In the middle of the stage one node is taken out of service and put back."""
    if len(nodes) < 2:
        raise UsageError("failover needs two nodes that can serve the model", hint="`gpumesh status` shows them")
    # Two requests per node: so each node has work at every moment, also between two requests.
    level = settings.concurrency[0] if settings.concurrency else 2 * len(nodes)
    count = settings.requests or 10 * level  # ten rounds: enough before, during and after the disturbance
    return [_make_mesh_stage("failover", prompts, count, level, disturb=True)]


def _plan_replay(settings: BenchSettings, prompts: PromptFactory, trace: Sequence[TracedRequest]) -> list[Stage]:
    """Replays a public trace: sends requests at the trace's own times (÷ speed), whether or not the mesh keeps up."""
    if not trace:
        raise UsageError("replay needs a trace", hint="--trace FILE: Azure's CSV or Mooncake's JSONL")
    traced_requests = trace[: settings.requests] if settings.requests else trace
    start_s = traced_requests[0].at_s  # the first request is sent at the start of the stage
    requests = [
        PlannedRequest(prompts.make_traced_prompt(traced), at_s=(traced.at_s - start_s) / settings.speed)
        for traced in traced_requests
    ]
    return [_make_stage("replay", StageKind.TRACE, requests, concurrency=None)]
