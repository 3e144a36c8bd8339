"""Builds the ``Candidate`` of a node, which the balancer ranks, and its ``NodeState``, which people read.

Both are built from the tunnel's state, the probes' reports and the ledger. The builder only reads these three, and does
no I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from socket import gethostname

from gpumesh.balancer.base import Candidate
from gpumesh.balancer.outliers import Slowness
from gpumesh.coordination.base import Coordination
from gpumesh.mesh.nodes.answer_findings import find_foreign_answer
from gpumesh.mesh.nodes.drains import describe_drain
from gpumesh.mesh.nodes.ledger import Ledger
from gpumesh.mesh.nodes.model_findings import broken_model_states, find_model_findings
from gpumesh.mesh.nodes.prober import NodeReports, Prober
from gpumesh.mesh.nodes.rate_meter import RateMeter
from gpumesh.mesh.nodes.scheduling_snapshot import decision_states, learned_states, loading_state
from gpumesh.mesh.nodes.tunnel_link import TunnelLink
from gpumesh.probes.health import assess_health
from gpumesh.state import (
    BackendState,
    Finding,
    Health,
    HostState,
    LearnedState,
    LoadState,
    NodeState,
    RouteState,
    Severity,
    SlownessState,
    TunnelPhase,
    TunnelState,
)
from gpumesh.text.addresses import is_loopback
from gpumesh.text.model_names import full_name
from gpumesh.topology import NodeSpec, SshSpec

MAX_KEY_CHARS = 400  # room for the UUIDs of eight GPUs
MAX_MODEL_PAUSE_S = 6.0  # a request waits for a model's breaker if its pause ends within this time
# A node that is away for longer will hardly be back in the few seconds for which a request waits.
MAX_AWAY_S = 120.0


@dataclass(slots=True)
class NodeRole:
    """What the mesh has decided about a node. ``slowness``: how slow it has become; ``None`` while its speed is as
    usual.

    ``drained``: a person asked for no new requests, until a person resumes it. ``drain_holds``: those who ask for the
    same while they hold it (``mesh/outages/``, and other gateways: ``drains.py``).
    """

    drained: bool = False
    drain_holds: set[object] = field(default_factory=set)
    slowness: Slowness | None = None

    @property
    def draining(self) -> bool:
        """Whether the node gets no new requests."""
        return self.drained or bool(self.drain_holds)


class SnapshotBuilder:
    """Builds the snapshots of one node, and answers the questions about it that need only the last reports."""

    def __init__(
        self,
        spec: NodeSpec,
        role: NodeRole,
        link: TunnelLink,
        prober: Prober,
        ledger: Ledger,
        *,
        meter: RateMeter,
        clock: Callable[[], float],
        coordination: Coordination,
    ) -> None:
        self.spec = spec
        self._role = role
        self._link = link
        self._prober = prober
        self._ledger = ledger
        self._meter = meter
        self._clock = clock
        self._coordination = coordination
        self._coordination_key = coordination_key(spec, prober.reports)
        self._coordination_key_reports = prober.reports  # the reports from which the key was computed
        self._has_gpu_key = False  # whether the key names GPUs
        self._learned: tuple[LearnedState, ...] = ()
        self._learned_version: tuple[int, bool, int | None] | None = None  # what ``_learned`` was built from

    # -- for the balancer ----------------------------------------------------------------------------------------

    @property
    def reachable(self) -> bool:
        """Whether the tunnel is up and the server answered its last probe."""
        return self._link.is_up and self._prober.reports.backend_is_up

    def may_recover(self, model: str | None) -> bool:
        """Whether the node takes no requests for this model now, but probably will in a moment. ``None``: whether this
        is so for requests of any model.

        It is so while the node connects, or after its connection was lost, if that was not long ago, or while a breaker
        pauses it for a short time."""
        # A draining node takes requests again only when a person resumes it, a disabled node never.
        if self._role.draining or not self.spec.enabled:
            return False
        now = self._clock()
        pause_s = None if model is None else self._ledger.model_breakers.pause_left(full_name(model), now)
        if pause_s is not None and pause_s > MAX_MODEL_PAUSE_S:
            return False
        if self.reachable:  # then only an open breaker keeps requests away: the model's, or the node's own
            return pause_s is not None or not self._ledger.breaker.allows(now)
        phase, reports = self._link.reported.state, self._prober.reports
        if phase is TunnelPhase.UP:
            return reports.backend is None  # the first probe over this connection is not complete
        away_since = self._link.away_since
        if away_since is not None and now - away_since > MAX_AWAY_S:
            return False
        if phase is TunnelPhase.BACKOFF:
            return reports.models is not None  # the node has worked before
        return phase in (TunnelPhase.IDLE, TunnelPhase.CONNECTING)  # not FAILED: a person has to act first

    def next_trial_s(self, model: str | None) -> float | None:
        """The seconds until the node, or this model on it, is tried again after a failure; ``None`` if that is not
        known. While the node is draining, nobody tries it."""
        if self._role.draining:
            return None
        now, breaker = self._clock(), self._ledger.breaker
        waits = [
            None if self._link.is_up else self._link.state.retry_in_s,
            None if breaker.open_until is None else max(breaker.open_until - now, 0.0),
            None if model is None else self._ledger.model_breakers.pause_left(full_name(model), now),
        ]
        return max((wait_s for wait_s in waits if wait_s is not None), default=None)

    def candidate(self, now: float, *, despite_breaker: bool) -> Candidate:
        """The node as the balancer sees it at the time ``now``. ``despite_breaker``: the node counts as usable even if
        its breaker is open, and so does a model that failed for an unknown reason."""
        role, link, reports, ledger = self._role, self._link, self._prober.reports, self._ledger
        # The property ``reachable``, written out: this is computed for each request.
        reachable = link.is_up and reports.backend_is_up
        usable = reachable and not role.draining and (despite_breaker or ledger.breaker.allows(now))
        return Candidate(
            name=self.spec.name,
            kind=reports.kind,
            usable=usable,
            models=reports.models,
            broken_models=ledger.model_breakers.broken(now, despite_doubt=despite_breaker),
            enabled=self.spec.enabled,
        )

    @property
    def other_gateways_in_flight(self) -> int:
        """The number of requests that other gateways have in flight on the node's GPUs, as
        ``Coordination.others_in_flight`` counts them."""
        account = self._ledger.account
        own = sum(len(member.placed) for member in account.group.accounts)
        # A learned number of slots is for one model: it is no limit for all requests together.
        limit = None if account.counts_by_model else account.slots("", self._clock())
        return self._coordination.others_in_flight(self.coordination_key, own, limit)

    @property
    def coordination_key(self) -> str:
        """The key of the last reports. It is computed again only when the reports have changed.

        While the GPUs are not known any more, because nvidia-smi has just failed or the tunnel is new, the key stays as
        it was: the other gateways still have that key for them."""
        reports = self._prober.reports
        if reports is not self._coordination_key_reports:
            self._coordination_key_reports = reports
            sees_gpus = reports.gpus is not None and bool(reports.gpus.gpus)
            if sees_gpus or not self._has_gpu_key:
                self._coordination_key = coordination_key(self.spec, reports)
                self._has_gpu_key = sees_gpus
        return self._coordination_key

    # -- for people ----------------------------------------------------------------------------------------------

    def state(self, queued: int) -> NodeState:
        """The node as people see it now. ``queued``: the number of requests in the mesh's queue that wait for this node
        only."""
        spec, tunnel, gpu_report = self.spec, self._link.state, self._prober.reports.gpus
        ledger, now = self._ledger, self._clock()
        backend = self._build_backend_state(tunnel)
        health, reason = self._assess_health(tunnel)
        gpus = None  # not known
        if gpu_report is not None and gpu_report.error is None:
            gpus = gpu_report.gpus
        return NodeState(
            name=spec.name,
            health=health,
            reason=reason,
            tunnel=tunnel,
            backend=backend,
            host=HostState() if gpu_report is None else HostState(gpu_report.hostname, gpu_report.driver),
            gpus=gpus,
            load=self._build_load_state(queued),
            labels=tuple(sorted(spec.labels.items())),
            simulated=(backend.version or "").endswith("-lab"),  # as the simulated servers of ``gpumesh.lab`` do
            routes=self._build_routes(),
            noticed=self._collect_findings(tunnel),
            broken_models=broken_model_states(ledger.model_breakers.open_faults, now),
            slowness=_build_slowness_state(self._role.slowness),
            learned=self._build_learned_states(),
            decisions=decision_states(ledger.forecasts, now),
            loading=loading_state(ledger.forecasts, now),
            pool_members=spec.pool_members,
        )

    def _build_learned_states(self) -> tuple[LearnedState, ...]:
        """What was learned about the models. It is built again only when something may have changed: when a request was
        served, when stored figures were restored, or when the server tells another number of slots."""
        account = self._ledger.account
        version = (self._ledger.served, account.rates.is_empty, account.reported_parallel)
        if version != self._learned_version:
            self._learned_version, self._learned = version, learned_states(account)
        return self._learned

    def _assess_health(self, tunnel: TunnelState) -> tuple[Health, str | None]:
        """The node's health, and the reason for it in one sentence; a healthy node has no reason."""
        reports = self._prober.reports
        if not self.spec.enabled:
            return Health.UNKNOWN, "disabled in mesh.yaml"
        if reports.missing_secret is not None and reports.backend is None:  # the server could not be asked yet
            return Health.DOWN, reports.missing_secret.message
        health, reason = assess_health(tunnel, reports.gpus, reports.backend, self.spec, self._role.draining)
        if health is Health.DRAINING and not self._role.drained:
            reason = describe_drain(self._role.drain_holds) or reason
        return health, reason

    def _build_load_state(self, queued: int) -> LoadState:
        """The node's requests: those in flight, those that wait for this node only, and how the others ended."""
        ledger = self._ledger
        return LoadState(
            in_flight=ledger.in_flight,
            queued=queued,
            limit=self._find_shown_limit(),
            served=ledger.served,
            failed=ledger.failed,
            cancelled=ledger.cancelled,
        )

    def _find_shown_limit(self) -> int | None:
        """The limit for people; ``None`` if it is not known. A learned limit is shown as the proven number of requests,
        and only after the first served request, which proves it. The balancer's limit may be one more, to try whether
        one more request runs in parallel."""
        is_learned = self.spec.backend.max_parallel is None and self._prober.reports.learns_limit
        if not is_learned:
            account = self._ledger.account
            return account.max_parallel if account.max_parallel is not None else account.reported_parallel
        return self._ledger.account.learned_slots.most_proven if self._ledger.served else None

    def _build_backend_state(self, tunnel: TunnelState) -> BackendState:
        """The state of the server by its last probe, with the rate that is measured now. While the tunnel is not up, or
        before the first probe, only the kind is known, and whether the API key is missing."""
        reports = self._prober.reports
        if reports.backend is None or tunnel.state is not TunnelPhase.UP:
            missing_secret = reports.missing_secret
            error = None if missing_secret is None else missing_secret.message
            return BackendState(kind=reports.kind.value, last_error=error)
        rate = self._meter.rate()
        # A node that has not worked yet has no rate. Later, its rate may be 0.
        has_worked = rate > 0 or self._ledger.served > 0
        return replace(reports.backend.state, tokens_per_s=rate if has_worked else None)

    def _build_routes(self) -> tuple[RouteState, ...]:
        """The routes to all targets that the tunnel reaches, in the order of mesh.yaml."""
        transport = self._link.reported.transport
        return tuple(RouteState(target.url, url, transport) for target, url in self._link.urls.items())

    def _collect_findings(self, tunnel: TunnelState) -> tuple[Finding, ...]:
        """The findings of the last probes and of the last requests. While the tunnel is not up there are none, because
        they would be out of date. The findings about the tunnel and about mesh.yaml come from the audit's rules, not
        from here."""
        if tunnel.state is not TunnelPhase.UP:
            return ()
        reports = self._prober.reports
        findings = reports.gpus.findings if reports.gpus is not None else ()
        if reports.backend is not None:
            model_findings = find_model_findings(self.spec.name, self._ledger.model_breakers.open_faults)
            answer_findings = find_foreign_answer(self.spec.name, self._ledger.foreign_answer)
            return (*findings, *reports.backend.findings, *model_findings, *answer_findings)
        error = reports.missing_secret
        if error is None:
            return findings
        return (*findings, Finding(error.code, Severity.ERROR, self.spec.name, error.message, error.hint))


def _build_slowness_state(slowness: Slowness | None) -> SlownessState | None:
    """The slowness as people see it: its factors are rounded to two decimals."""
    if slowness is None:
        return None
    ratios = (slowness.factor, slowness.first_token, slowness.decode)
    factor, first_token, decode = (None if ratio is None else round(ratio, 2) for ratio in ratios)
    return SlownessState(factor or 1.0, first_token, decode)


def coordination_key(spec: NodeSpec, reports: NodeReports) -> str:
    """A name of the node's GPUs, or of its server's address if no GPU is known. It is the same in every gateway that
    reaches them."""
    if reports.gpus is not None and reports.gpus.gpus:
        uuids = "+".join(sorted(gpu.uuid for gpu in reports.gpus.gpus))
        if len(uuids) <= MAX_KEY_CHARS:
            return uuids
        # One message holds the keys of all nodes. A node that shows many GPUs must not make the message so long that
        # other gateways refuse to read it.
        return f"gpus:{sha256(uuids.encode()).hexdigest()}"
    target = reports.target or spec.backend.targets[0]
    if spec.ssh is not None:
        return f"{_name_host(spec.ssh)}/{target.url}"
    # Each machine has its own server at a loopback address.
    return f"{gethostname()}/{target.url}" if is_loopback(target.host) else target.url


def _name_host(ssh: SshSpec) -> str:
    """A name of the host that no other host has. Behind jump hosts an address is private, and another network may have
    it too. If only a command knows the address, the command stands for it, as a hash: it may contain a secret."""
    name = f"{ssh.host}:{ssh.port}"
    if ssh.address_from is not None:
        command = "\0".join(ssh.address_from.command)
        name = f"address_from:{sha256(command.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
    return ">".join((*ssh.proxy_jump, name))
