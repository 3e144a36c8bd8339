"""One node while the mesh runs: a facade over its tunnel, its probes, its ledger and its snapshots.

``tunnel_link`` knows the tunnel, ``prober`` probes the host, ``ledger`` gives out leases, and ``snapshot`` builds the
states that others see. This file connects the four: a change of the tunnel changes the other three. All of them run on
one event loop, and nothing here blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import httpx

from gpumesh import audit
from gpumesh.backends.dialects import KINDS_WITH_MODEL_STORE
from gpumesh.balancer.base import Candidate, Demand, ResidencyKey
from gpumesh.balancer.breaker import ModelFault
from gpumesh.balancer.limits import NodeSlots
from gpumesh.balancer.models.model_rules import ModelRules
from gpumesh.balancer.outcomes import Outcome, rule_for_outcome
from gpumesh.balancer.rates import ServiceRates
from gpumesh.balancer.scheduling.scheduler import Placement, Scheduler
from gpumesh.coordination.base import Coordination
from gpumesh.coordination.single_gateway import SingleGateway
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.learned_state import LearnedState, build_host_key
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.nodes.ledger import Ledger
from gpumesh.mesh.nodes.prober import Prober, read_api_key
from gpumesh.mesh.nodes.rate_meter import RateMeter
from gpumesh.mesh.nodes.residency_reports import take_over_report
from gpumesh.mesh.nodes.snapshot import NodeRole, SnapshotBuilder
from gpumesh.mesh.nodes.tunnel_link import TunnelLink
from gpumesh.probes.commands.host_commands import HostCommands
from gpumesh.state import NodeState, TunnelPhase, TunnelState
from gpumesh.text.model_names import full_name
from gpumesh.topology import BackendKind, NodeSpec, Target
from gpumesh.tunnels.base import Tunnel


class Node:
    """One node of a running mesh. Implements ``lease.LeasedNode``, the part of a node that a request uses.

    ``scheduler`` places the requests; the node keeps its account there. ``on_slot_freed`` is called when a slot may
    have become free, ``on_changed`` when the node may serve more requests than before, or fewer.
    ``on_gpus_identified`` is called when a probe shows other GPUs than before. ``coordination`` knows the load of other
    gateways; ``None``: there are none. ``rules`` are those of mesh.yaml for models; ``None``: there are none.
    ``learned`` knows what was learned about the server before a restart; ``None``: nothing is stored.
    """

    def __init__(
        self,
        spec: NodeSpec,
        *,
        clock: Callable[[], float],
        http: httpx.AsyncClient,
        changes: ChangeNotifier,
        scheduler: Scheduler,
        on_slot_freed: Callable[[], None],
        on_changed: Callable[[], None],
        on_gpus_identified: Callable[[], None],
        coordination: Coordination | None = None,
        rules: ModelRules | None = None,
        learned: LearnedState | None = None,
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.uses_ssh = spec.ssh is not None
        self.role = NodeRole()
        self.meter = RateMeter(clock)
        self._changes = changes
        self._on_changed = on_changed
        self._scheduler = scheduler
        self.account = scheduler.roster.add(
            spec.name, weight=spec.weight, tier=spec.tier, max_parallel=spec.backend.max_parallel
        )
        self._on_gpus_identified = on_gpus_identified
        self._gpu_marks: frozenset[str] = frozenset()  # what identifies the node's GPUs, by the last report
        self._clock = clock
        self._learned = learned
        self.host_key: str | None = None
        """The key of the server in the file of learned figures; ``None`` until the server was seen."""
        self.server_version: str | None = None  # when the server was seen last; ``None`` if it is not known
        self._link = TunnelLink(spec, clock=clock)
        self._link.away_since = self.opened_at = clock()
        self.ledger = Ledger(
            self.account,
            scheduler,
            clock=clock,
            on_slot_freed=on_slot_freed,
            on_change=changes.notify,
            on_failure=self._check_after_failure,
            on_model_loaded=self._note_loaded,
        )
        self._rules = rules or ModelRules()
        self._prober = Prober(
            spec, self._link, self.ledger, clock=clock, http=http, on_report=self._on_report, rules=self._rules
        )
        self._snapshots = SnapshotBuilder(
            spec,
            self.role,
            self._link,
            self._prober,
            self.ledger,
            meter=self.meter,
            clock=clock,
            coordination=coordination or SingleGateway(),
        )
        if not spec.enabled:
            self._prober.end_first_round()
        self.update_account()

    def __repr__(self) -> str:
        flags = " draining" if self.role.draining else ""
        reachable = "reachable" if self.reachable else "unreachable"
        return f"<Node {self.name} {reachable}{flags} {self.in_flight} in flight, tunnel {self.tunnel_state.state}>"

    # -- lifetime ------------------------------------------------------------------------------------------------

    async def run(self, tunnel: Tunnel) -> None:
        """Runs the tunnel and both probe loops, until cancelled."""
        self.tunnel = tunnel
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(tunnel.run(), name=f"tunnel {self.name}")
            tasks.create_task(self._prober.keep_probing_backend(), name=f"backend of {self.name}")
            tasks.create_task(self._prober.keep_probing_gpus(), name=f"gpus of {self.name}")

    def change_spec(self, spec: NodeSpec) -> None:
        """Takes over another spec of the node that needs no other tunnel (``needs_new_tunnel``)."""
        self.spec = spec
        self._prober.change_spec(spec)
        self._snapshots.spec = spec
        account = self.account
        account.weight, account.tier, account.max_parallel = spec.weight, spec.tier, spec.backend.max_parallel
        account.group.events += 1  # when the next slot is free has to be computed again
        self.announce_change()

    def apply_model_rules(self) -> None:
        """Takes over the mesh's rules for models after they have changed."""
        self._prober.apply_model_rules()

    def on_tunnel(self, state: TunnelState) -> None:
        """Acts on a new state of the tunnel, which calls this after each change of its state."""
        was_up = self._link.is_up
        self._link.update(state)
        if self._link.is_up and not was_up:
            # The breakers are reset here, and not when the old connection was lost: the requests that were cut with it
            # are counted as failed only a moment after the loss.
            self.ledger.reset_breakers()
            self._prober.request_probe()
            self._link.away_since = None
        elif was_up and not self._link.is_up:
            self._link.away_since = self._clock()
            self._prober.forget_host()
            self.ledger.abort_all_attempts()
        # Out of reach, or not in the mesh any more: nobody needs to wait for a probe.
        if state.state in (TunnelPhase.BACKOFF, TunnelPhase.FAILED, TunnelPhase.CLOSED):
            self._prober.end_first_round()
        self.announce_change()

    def _on_report(self) -> None:
        """Acts on a new report of the prober. If the marks that identify the node's GPUs have changed, the nodes of the
        mesh are grouped again."""
        account, prober = self.account, self._prober
        for model in take_over_report(account, prober.reports, self._rules, asked_at=prober.asked_at):
            self._scheduler.note_unloaded(account, model)
        self._restore_learned()
        marks = audit.identifying_marks(self.state(queued=0))
        if marks != self._gpu_marks:
            self._gpu_marks = marks
            self._on_gpus_identified()
        self.announce_change()

    def announce_change(self) -> None:
        """Tells everybody who depends on the node's state that it may have changed."""
        self.update_account()
        self._on_changed()
        self._changes.notify()

    def update_account(self) -> None:
        """Tells the scheduler what the tunnel and the last reports say of the node, and whether it is draining. Learns
        from the scheduler how slow the node is."""
        account, reports = self.account, self._prober.reports
        account.is_up = self.reachable and not self.role.draining
        account.kind = reports.kind
        account.models = reports.models
        account.foreign_load = reports.foreign_load or 0.0
        account.rtt_s = (self._link.reported.rtt_ms or 0.0) / 1000.0
        account.learns_limit = reports.learns_limit
        report = reports.backend
        account.reported_parallel = None if report is None or report.inventory is None else report.inventory.parallel
        account.residency.is_tracked = reports.kind in KINDS_WITH_MODEL_STORE
        self.update_other_loads()
        self._scheduler.note_report(account)
        # The other way round: for the state that people see.
        self.role.slowness = self._scheduler.slow_nodes.slowness(self.name, self._clock())

    def update_other_loads(self) -> None:
        """Tells the account how many requests other gateways have in flight on the node's GPUs. Also called after each
        report, because a gateway that has crashed does not announce that its load is gone."""
        group = self.account.group
        if group.accounts[0] is self.account:  # the first node of a group answers for all, because they share the GPUs
            group.others_in_flight = self._snapshots.other_gateways_in_flight

    def _restore_learned(self) -> None:
        """Takes over what was learned about the server before a restart of the mesh. This happens when the server is
        seen first, and again when its key or version changes: the key changes when the server's GPUs are seen."""
        reports = self._prober.reports
        if reports.backend is None or not reports.backend_is_up or reports.target is None:
            return
        key = build_host_key(self.coordination_key, url=reports.target.url, kind=reports.kind.value)
        version = reports.backend.state.version
        if (key, version) != (self.host_key, self.server_version):
            if self.host_key is not None:  # perhaps another server: its speed must not be compared with the old one's
                self._scheduler.slow_nodes.forget(self.name)
            self.host_key, self.server_version = key, version
            if self._learned is not None:
                self._learned.restore(self, self._clock())

    @property
    def rates(self) -> ServiceRates:
        """How fast the node serves each model."""
        return self.account.rates

    @property
    def learned_slots(self) -> NodeSlots:
        return self.account.learned_slots

    def note_load_sent(self, key: ResidencyKey) -> None:
        """Notes that the server was asked to load this model with these options, without a request to it. From now on
        the model counts as loaded."""
        account = self.account
        pushed_out = account.residency.pushed_out_by(key, account.placed_by_model)
        account.residency.note_sent(key, pushed_out, now=self._clock(), load_s=account.rates.load_s(key.model))
        self._scheduler.note_report(account)

    def note_load_ended(self, key: ResidencyKey, *, is_loaded: bool) -> None:
        """Notes that the load of ``note_load_sent`` has ended. ``is_loaded``: with success."""
        if is_loaded:
            self.account.residency.note_answer(key, self._clock())
        else:
            self.account.residency.note_failed_load(key.model)
            self._prober.request_probe()  # the server may have unloaded others before it failed
        self._scheduler.note_report(self.account)
        self._on_changed()

    def note_unloaded(self, model: str) -> None:
        """Notes that the server has unloaded the model (a full name), because it was asked to."""
        self.account.residency.note_unloaded(model, self._clock())
        self._scheduler.note_unloaded(self.account, model)
        self._scheduler.note_report(self.account)

    def _check_after_failure(self, outcome: Outcome, error: str | None) -> None:
        """Probes the server, and for some outcomes checks the tunnel, at once, because an attempt has failed."""
        self._prober.request_probe()
        if rule_for_outcome(outcome).check_tunnel:
            self._link.suspect(error or outcome.value)
        self._on_changed()  # a breaker may have opened, so that waiting requests have no node any more

    def _note_loaded(self, model: str) -> None:
        self._prober.note_loaded(model)

    def check_now(self, reason: str) -> None:
        """Probes the server, and checks the tunnel, at once."""
        self._prober.request_probe()
        self._link.suspect(reason)

    @property
    def reported(self) -> bool:
        """Whether the first round of probes is over: the node was probed once, or is known to be out of reach."""
        return self._prober.first_round_done

    async def wait_reported(self) -> None:
        await self._prober.wait_first_round()

    async def refresh(self) -> None:
        """Probes the server, if the tunnel is up, and returns after this probe, which begins after the call."""
        await self._prober.refresh()

    # -- the tunnel ----------------------------------------------------------------------------------------------

    @property
    def tunnel(self) -> Tunnel | None:
        return self._link.tunnel

    @tunnel.setter
    def tunnel(self, tunnel: Tunnel) -> None:
        self._link.tunnel = tunnel

    @property
    def tunnel_state(self) -> TunnelState:
        return self._link.state

    @property
    def connection_count(self) -> int:
        """How many connections the node's tunnel has had so far."""
        return self._link.connection_count

    @property
    def host_commands(self) -> HostCommands | None:
        """Runs the probes' commands on the host, over the tunnel's last connection; ``None`` before the first one."""
        return self._link.commands

    def is_same_connection(self, lease: Lease) -> bool:
        """Whether the tunnel still has the connection that it had when this lease was given.

        If it has not, a failed request says nothing about the server. Always true for a direct node: it has no
        connection that could be lost while its server still runs."""
        if not self.uses_ssh:
            return True
        return self._link.is_up and lease.connection_number == self._link.connection_count

    # -- requests ------------------------------------------------------------------------------------------------

    def lease(self, demand: Demand, placement: Placement | None) -> Lease:
        """Gives out a lease for a request that was placed here. ``placement`` is ``None`` for a request that needs no
        slot."""
        return self.ledger.lease(self, demand, placement)

    def is_loaded(self, model: str) -> bool | None:
        """Whether the model, given by its full name, is in the server's memory; ``None`` if that is not known."""
        return self._prober.reports.is_loaded(model)

    def forgive_failure(self, lease: Lease) -> None:
        """Takes back the failure with which this lease ended, because the request was at fault."""
        self.ledger.forgive_failure(lease)

    def server_name(self, model: str) -> str | None:
        """The name under which this node's server must be asked for a model: the one that the server lists, or the name
        in the mesh if the server lists none. ``None``: ``model`` itself will do."""
        spec, reports = self._rules.find(model), self._prober.reports
        if spec is not None and spec.aliases:
            return reports.server_names.get(spec.name, spec.name)
        name = reports.exact_names.get(model) or reports.exact_names.get(full_name(model))
        return None if name == model else name

    @property
    def in_flight(self) -> int:
        return self.ledger.in_flight

    @property
    def attempt_outcomes(self) -> Mapping[Outcome, int]:
        """The number of attempts that took a slot here, by the outcome of the attempt."""
        return self.ledger.attempt_outcomes

    @property
    def base_url(self) -> str:
        """The URL to which requests go, without a slash at the end. It exists only while ``reachable``."""
        report = self._prober.reports.backend
        assert report is not None, "not reachable: the server was not probed over this connection"
        assert report.url is not None, "not reachable: the server did not answer its last probe"
        return report.url

    @property
    def target(self) -> Target | None:
        """The server's address on its own host; ``None`` while it is not known which of the node's candidates answers.
        The Host header must name this address: Ollama answers 403 to a Host that is neither local nor its own."""
        return self._prober.reports.target

    @property
    def kind(self) -> BackendKind:
        """The kind of the node's server. With kind ``auto`` it is known after the first answered probe."""
        return self._prober.reports.kind

    def api_key(self) -> str | None:
        """The server's key. It is read from its variable at each use, and is never stored. Raises SecretMissing."""
        return read_api_key(self.spec)

    # -- what others see -----------------------------------------------------------------------------------------

    @property
    def reachable(self) -> bool:
        """Whether the tunnel is up and the server answered its last probe."""
        return self._snapshots.reachable

    def may_recover(self, model: str | None = None) -> bool:
        """Whether the node takes no requests for this model (``None``: for any) now, but probably will in a moment."""
        return self._snapshots.may_recover(model)

    def next_trial_s(self, model: str | None) -> float | None:
        """The seconds until the node, or this model on it, is tried again after a failure; ``None``: not known."""
        return self._snapshots.next_trial_s(model)

    def find_model_fault(self, model: str) -> ModelFault | None:
        """The fault for which requests for this model are kept away from the node; ``None`` if there is none."""
        return self.ledger.model_breakers.find_fault(full_name(model))

    def candidate(self, now: float, *, despite_breaker: bool = False) -> Candidate:
        """The node as the balancer sees it now."""
        return self._snapshots.candidate(now, despite_breaker=despite_breaker)

    def state(self, queued: int) -> NodeState:
        """The node as people see it now. ``queued``: the number of requests that wait for this node only."""
        return self._snapshots.state(queued)

    @property
    def coordination_key(self) -> str:
        """A name of the node's GPUs or server, the same in every gateway that reaches them."""
        return self._snapshots.coordination_key
