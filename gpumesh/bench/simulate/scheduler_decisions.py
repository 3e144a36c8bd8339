"""The mesh's own ``Scheduler`` as the balancer of a simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from random import Random

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.breaker_updates import count_failure, count_success
from gpumesh.balancer.models.residency import Residency
from gpumesh.balancer.outcomes import AttemptContext, ErrorReply, Outcome, find_blame
from gpumesh.balancer.prefixes.cache_size import BYTES_PER_TOKEN
from gpumesh.balancer.prefixes.prints import PromptPrint, print_from_ids
from gpumesh.balancer.scheduling.scheduler import Placement, Scheduler
from gpumesh.bench.simulate.fleet import NodeSpec
from gpumesh.bench.simulate.requests import Attempt, Grant, Job, ServerReport, SimulatedRequest
from gpumesh.bench.simulate.servers.lies import ServerLies
from gpumesh.state import ModelInfo
from gpumesh.topology import PolicyKind

KNUTHS_FACTOR = 2_654_435_761  # 2**32 divided by the golden ratio: Knuth's multiplicative hashing


class SchedulerDecisions:
    """Implements ``Decisions``."""

    def __init__(self, specs: Sequence[NodeSpec], kind: PolicyKind, *, rng: Random, max_queue: int) -> None:
        self._scheduler = Scheduler(kind, rng=rng, max_queue=max_queue)
        self._accounts = self._scheduler.accounts
        for spec in specs:
            account = self._scheduler.roster.add(spec.name, weight=spec.weight, max_parallel=spec.max_parallel)
            account.is_up = True
            account.learns_limit = True
            _set_models(account, ServerLies(spec).listed)
            account.rtt_s = spec.rtt_s
            account.residency.memory_mib = None if spec.vram_mib is None else int(spec.vram_mib)
            account.residency.file_mib = {name: int(model.vram_mib / 1.2) for name, model in spec.models.items()}
            account.residency.replace_with_report(dict.fromkeys(spec.loaded, (None, None)), asked_at=0.0)
            self._scheduler.note_report(account)
        self._reported: dict[str, ServerReport] = {}  # the last report of each node that changed something

    def submit(self, job: Job, now: float) -> Grant | None:
        """Places the job, or lets it wait (``None``). A grant without a node: no node can serve the job, or the queue
        is full."""
        demand = _demand(job)
        placement = self._scheduler.place_now(demand, now, exclude=job.failed_nodes)
        if placement is not None:
            return _grant(job, placement)
        if not self._scheduler.choice.can_serve(demand, now, exclude=job.failed_nodes):
            return Grant(job, None)
        try:
            self._scheduler.wait(
                demand,
                now,
                job,
                exclude=job.failed_nodes,
                accepted_at=job.submitted_at if job.attempts else None,
            )
        except OverflowError:
            return Grant(job, None)
        return None

    def grants(self, now: float) -> Sequence[Grant]:
        return [_grant(entry.payload.payload, placement) for entry, placement in self._scheduler.grants(now)]

    def next_check(self, now: float) -> float | None:  # noqa: ARG002  # the scheduler knows the time
        return self._scheduler.next_check()

    def note_first_token(self, attempt: Attempt, now: float) -> None:
        self._scheduler.note_first_token(attempt.running, now)

    def end(self, attempt: Attempt, now: float, outcome: Outcome, counters: ServerCounters | None) -> None:
        """Counts the end of an attempt as the mesh does: for the breakers, for the learned rates, and for the slots."""
        account, model = self._accounts[attempt.node], attempt.job.request.model
        if outcome is Outcome.SERVED:
            attempt.running.answer_bytes = int(attempt.job.tokens_left * _bytes_per_token(attempt.job.request))
            count_success(account, model, now, takes_slot=True)
        else:
            reply = ErrorReply(404, f"model {model!r} not found") if outcome is Outcome.MODEL_NOT_FOUND else None
            context = AttemptContext(takes_slot=True, model=model, was_loaded=None, reply=reply)
            count_failure(account, context, find_blame(outcome, context), now)
        self._scheduler.end(attempt.running, now, counters if outcome is Outcome.SERVED else None)
        if outcome is not Outcome.SERVED:
            self._scheduler.note_failed(attempt.running)

    def set_report(self, node: str, report: ServerReport, now: float) -> None:
        """Takes over what the node reports of itself: whether it is up, and its models on disk and in memory."""
        account, loaded = self._accounts[node], report.loaded
        last = self._reported.get(node)
        has_changes = (
            last is None
            or report.is_up != account.is_up
            or loaded is not last.loaded
            or report.listed is not last.listed
            or account.model_breakers.faults
        )
        if not has_changes and not self._scheduler.queue.size and _agrees(account.residency, loaded):
            return  # most reports change nothing; without this shortcut, they would take 5 % of the time
        self._reported[node] = report
        account.is_up = report.is_up
        _set_models(account, report.listed)
        for model in account.residency.replace_with_report(loaded, asked_at=now):
            self._scheduler.note_unloaded(account, model)
        self._scheduler.note_report(account)


def _set_models(account: NodeAccount, listed: AbstractSet[str]) -> None:
    """Gives the server's list of models to the account, as the mesh does after a probe."""
    account.models = listed
    account.model_breakers.note_catalog([ModelInfo(model) for model in sorted(listed)])


def _bytes_per_token(request: SimulatedRequest) -> float:
    """How many bytes of the answer make one token: from 2.8 to 5.7, because languages differ; the same in each
    simulation."""
    spread = (request.number * KNUTHS_FACTOR) % (1 << 32) / (1 << 32)  # from 0 to 1, as good as random
    return float(BYTES_PER_TOKEN * 2.0 ** (spread - 0.5))


def _agrees(residency: Residency, reported: Mapping[str, tuple[int, int]]) -> bool:
    """Whether the models that the balancer believes to be loaded are the reported models, and no load is expected."""
    loaded = residency.loaded
    return loaded.keys() == reported.keys() and all(model.loading_until is None for model in loaded.values())


def _grant(job: object, placement: Placement) -> Grant:
    assert isinstance(job, Job)
    return Grant(job, placement.placed.account.name, placement.placed)


def _demand(job: Job) -> Demand:
    """What the balancer knows of the job's request: all but the length of its answer."""
    request = job.request
    return Demand(
        model=request.model,
        priority=request.priority,
        session=request.session,
        prompt_tokens=job.prompt_tokens,
        max_tokens=request.max_tokens,
        residency=ResidencyKey(request.model, request.context),
        client=request.client,
        prompt=_print(request),
    )


def _print(request: SimulatedRequest) -> PromptPrint | None:
    if not request.blocks:
        return None
    id_bytes = int(request.block_tokens * BYTES_PER_TOKEN)
    return print_from_ids(request.blocks, id_bytes=id_bytes, size=int(request.prompt_tokens * BYTES_PER_TOKEN))
