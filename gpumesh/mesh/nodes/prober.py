"""Sets how often a node is probed and how long a probe may take; ``Prober`` runs the probes and keeps the last reports.

One loop probes the node's inference server, another loop its GPUs, every 2 s each. The loops change only three things:
they update ``reports``, reset the ledger's breakers, and abort attempts on a server that no longer answers. No fault of
a host makes them raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import httpx

from gpumesh import config
from gpumesh.backends.base import ParallelismSource
from gpumesh.backends.dialects import DIALECTS, KINDS_WITH_MODEL_STORE, find_dialect
from gpumesh.balancer.models.model_rules import ModelRules
from gpumesh.errors import SecretMissing
from gpumesh.mesh.nodes.ledger import Ledger
from gpumesh.mesh.nodes.tunnel_link import TunnelLink
from gpumesh.probes.backend import BackendReport, probe_backend
from gpumesh.probes.nvidia_smi import Answer, GpuReport, probe_gpus
from gpumesh.probes.server_kind import KnownKinds
from gpumesh.state import BackendPhase
from gpumesh.text.model_names import full_name, listed_spellings
from gpumesh.topology import BackendKind, NodeSpec, Target
from gpumesh.tunnels.stagger import stagger_intervals

log = logging.getLogger(__name__)

BACKEND_INTERVAL_S = 2.0
# Each request of a probe may take so long. A server that hangs is noticed within 10 s, even if the first missed probe
# is ignored (``_may_ignore_miss``): that is one interval, and two probes that run into this time-out.
BACKEND_TIMEOUT_S = 4.0
GPU_INTERVAL_S = 2.0
# A probe of the GPUs may take so long; then the node gets a finding that says what the host waits for. The time-out
# must be longer than the 1 to 3 s that a first call of nvidia-smi takes without persistence mode. It must be shorter
# than the 7 s in which a command expects the first report of all nodes (cli/first_report.py): without this probe a node
# has not reported.
GPU_TIMEOUT_S = 5.0
# Where nvidia-smi is always slow, a probe may take this many times as long as the last one, up to this time.
GPU_PATIENCE_FACTOR = 3.0
MAX_GPU_TIMEOUT_S = 30.0
MAX_GPU_POWER_W = 10_000.0  # of one GPU: a higher figure is not believed
# The longest time between two probes of a host that gives no session. The times double up to it.
MAX_GPU_INTERVAL_S = 60.0
# The time after which a host that runs no commands is asked again. A new connection asks at once.
NO_COMMANDS_INTERVAL_S = 600.0
# Only if our last request ended longer ago than this, the GPUs' utilisation comes from other programs alone: nvidia-smi
# averages it over up to a second.
IDLE_S = 2.0


@dataclass(frozen=True, slots=True)
class NodeReports:
    """The last results of a node's probes. ``backend`` and ``gpus`` are ``None`` until the host was probed over the
    present connection; the other values stay when the tunnel reconnects.

    - ``missing_secret`` is the error that the variable with the server's API key is not set: then the server is not
      probed. ``None``: it is set, or no key is needed.
    - ``kind`` is the kind of the server; with ``auto`` in mesh.yaml it is known after the first answered probe.
    - ``models`` holds each listed name twice, as it is and in full, so that a request finds it by both. ``None``: no
      list was read yet. ``loaded`` holds the full names of the models in memory.
    - ``server_names`` has, for each model with aliases (``models:`` in mesh.yaml) that the server lists, the name
      under which the server lists it, by the name in the mesh. The balancer uses the name in the mesh, so ``models``
      holds this name too, and ``loaded`` holds it instead.
    - ``exact_names`` has the listed name of each model by this name and by its full name (``listed_spellings``), if the
      server knows no other spelling; empty for Ollama.
    - ``target`` is the server's address on its own host; ``None`` until a server has answered.
    - ``foreign_load`` is the utilisation (0 to 1) of the busiest GPU, measured while we had no request in flight there;
      ``None`` until it was measured.
    """

    backend: BackendReport | None = None
    gpus: GpuReport | None = None
    missing_secret: SecretMissing | None = None
    kind: BackendKind = BackendKind.AUTO
    models: frozenset[str] | None = None
    loaded: frozenset[str] = frozenset()
    server_names: Mapping[str, str] = field(default_factory=dict)
    exact_names: Mapping[str, str] = field(default_factory=dict)
    target: Target | None = None
    foreign_load: float | None = None

    learns_limit: bool = field(init=False)
    """Whether the durations in the server's answers show how many requests the server runs at once."""
    backend_is_up: bool = field(init=False)
    """Whether the server answered its last probe."""

    def __post_init__(self) -> None:
        """Computes the two values once: they are read for each request, and the reports change every few seconds."""
        dialect = find_dialect(self.kind)
        learns_limit = dialect is not None and dialect.parallelism is ParallelismSource.DURATIONS
        backend_is_up = self.backend is not None and self.backend.state.state is BackendPhase.UP
        # The only way to set the fields of a frozen dataclass.
        object.__setattr__(self, "learns_limit", learns_limit)
        object.__setattr__(self, "backend_is_up", backend_is_up)

    def is_loaded(self, model: str) -> bool | None:
        """Whether the model, given by its full name, is in the server's memory; ``None`` if that is not known. Only
        servers with a model store (Ollama) tell that a model is not in memory."""
        if model in self.loaded:
            return True
        server_tells = self.backend_is_up and self.kind in KINDS_WITH_MODEL_STORE
        return False if server_tells else None


class Prober:
    """Probes one node while its tunnel is up. ``on_report`` is called after each probe whose report was recorded.
    ``rules`` know the models' names in the mesh; ``None``: mesh.yaml has no rules."""

    def __init__(
        self,
        spec: NodeSpec,
        link: TunnelLink,
        ledger: Ledger,
        *,
        clock: Callable[[], float],
        http: httpx.AsyncClient,
        on_report: Callable[[], None],
        rules: ModelRules | None = None,
    ) -> None:
        self.reports = NodeReports(kind=spec.backend.kind)
        self._known_kinds = KnownKinds()
        self._spec = spec
        self._link = link
        self._ledger = ledger
        self._clock = clock
        self._http = http
        self._on_report = on_report
        self._rules = rules or ModelRules()
        self._probe_requested = asyncio.Event()  # ends the wait for the next probe
        self._backend_probe_lock = asyncio.Lock()  # held during a probe of the server
        self._first_round_done = asyncio.Event()  # set when the server was probed, or cannot be
        self._missed_backend_probes = 0  # in a row
        self._is_known_to_run_no_commands = False  # so that this is logged once
        self.asked_at = clock()
        """When the server was asked for the report that was recorded last."""

    def __repr__(self) -> str:
        backend = None if self.reports.backend is None else self.reports.backend.state.state.value
        gpus = None if self.reports.gpus is None else len(self.reports.gpus.gpus)
        return f"<Prober {self._spec.name} backend {backend}, {gpus} GPUs, first round done {self.first_round_done}>"

    # -- the first round -----------------------------------------------------------------------------------------

    @property
    def first_round_done(self) -> bool:
        """Whether the node was probed once, or is known to be out of reach."""
        return self._first_round_done.is_set()

    async def wait_first_round(self) -> None:
        await self._first_round_done.wait()

    def end_first_round(self) -> None:
        """Ends the first round without probes: the node is out of reach or disabled."""
        self._first_round_done.set()

    # -- called by the node --------------------------------------------------------------------------------------

    def forget_host(self) -> None:
        """Drops both reports, because the connection is lost: the next connection may lead to another host."""
        self.reports = replace(self.reports, backend=None, gpus=None)

    def request_probe(self) -> None:
        """Makes the loop probe the server at once, and not at the end of the interval."""
        self._probe_requested.set()

    def change_spec(self, spec: NodeSpec) -> None:
        """Takes over another spec of the same server. If its kind or its key is another one, probes it at once."""
        before, self._spec = self._spec.backend, spec
        if (before.kind, before.api_key_env) != (spec.backend.kind, spec.backend.api_key_env):
            self._known_kinds = KnownKinds()
            self.request_probe()

    def apply_model_rules(self) -> None:
        """Names the models of the last report by the mesh's rules as they are now."""
        report = self.reports.backend
        if report is not None and self.reports.backend_is_up:
            self._name_models(report)
            self._on_report()

    def note_loaded(self, model: str) -> None:
        """Adds a model to the models in memory, because it has just answered. ``model`` is a full name."""
        if model not in self.reports.loaded:
            self.reports = replace(self.reports, loaded=self.reports.loaded | {model})

    async def refresh(self) -> None:
        """Probes the server, if the tunnel is up, and returns after this probe. A probe that began before the call does
        not count."""
        async with self._backend_probe_lock:
            if self._link.is_up:
                await self._probe_backend()

    # -- the inference server ------------------------------------------------------------------------------------

    async def keep_probing_backend(self) -> None:
        """Probes the server at intervals and on request, until cancelled."""
        for interval_s in stagger_intervals(self._spec.name, BACKEND_INTERVAL_S):
            await self._link.wait_up()
            self._probe_requested.clear()
            async with self._backend_probe_lock:
                await self._probe_backend()
            try:
                async with asyncio.timeout(interval_s):
                    await self._probe_requested.wait()
            except TimeoutError:  # the interval is over, and nobody has asked for an earlier probe
                continue

    async def _probe_backend(self) -> None:
        """Probes the server once, and records the report, unless the connection was lost meanwhile or the report is a
        miss that may be ignored. Without the server's API key, records that the key is missing."""
        urls = self._link.urls
        try:
            api_key = read_api_key(self._spec)
        except SecretMissing as error:  # the variable is not set
            self.reports = replace(self.reports, missing_secret=error)
            self._first_round_done.set()  # without its key, the server cannot be asked in this round
            self._on_report()
            return
        # A key that was missing before may be there now: a program that uses gpumesh as a library can set the variable
        # while the mesh runs.
        if self.reports.missing_secret is not None:
            self.reports = replace(self.reports, missing_secret=None)
        asked_at = self._clock()
        report = await probe_backend(
            self._http,
            self._spec.backend,
            list(urls.values()),
            api_key=api_key,
            timeout_s=BACKEND_TIMEOUT_S,
            node=self._spec.name,
            known_kinds=self._known_kinds,
        )
        if not self._link.is_up:
            return  # the report is from a connection that is lost
        is_up = report.state.state is BackendPhase.UP
        self._missed_backend_probes = 0 if is_up else self._missed_backend_probes + 1
        if self._may_ignore_miss():
            self.request_probe()  # the next probe, which comes at once, decides
            return
        target_in_use = next((target for target, url in urls.items() if url == report.url), None)
        self.asked_at = asked_at
        self._record_backend(report, target_in_use)

    def _may_ignore_miss(self) -> bool:
        """Whether the last probe may have failed only because the server is busy: a server that reads a long prompt may
        miss one probe. So it must be the first miss in a row, a probe over this connection must have been recorded
        before, and requests must be in flight."""
        return self._missed_backend_probes == 1 and self.reports.backend is not None and self._ledger.in_flight > 0

    def _record_backend(self, report: BackendReport, target: Target | None) -> None:
        """Stores the report. A server that is up again gets new breakers; attempts on a server that is down are
        aborted if they can move."""
        was_down = self.reports.backend is not None and not self.reports.backend_is_up
        self.reports = replace(self.reports, backend=report, target=target)
        if self.reports.backend_is_up:
            self._name_models(report)
            if was_down:
                self._ledger.reset_breakers()
            self._ledger.model_breakers.note_catalog(report.state.catalog)
        else:
            self._ledger.abort_movable_attempts()
        self._end_first_round_when_complete()
        self._on_report()

    def _name_models(self, report: BackendReport) -> None:
        """Stores the models of a report under the names that the mesh uses for them."""
        rules, names = self._rules, report.state.models
        server_names = rules.server_names(names)
        all_names = (*names, *server_names)
        kind = BackendKind(report.state.kind)
        self.reports = replace(
            self.reports,
            kind=kind,
            models=frozenset(all_names) | frozenset(full_name(name) for name in all_names),
            loaded=frozenset(full_name(rules.name_in_mesh(loaded.name)) for loaded in report.state.loaded),
            server_names=server_names,
            exact_names=listed_spellings(names) if DIALECTS[kind].has_exact_names else {},
        )

    # -- the GPUs ------------------------------------------------------------------------------------------------

    async def keep_probing_gpus(self) -> None:
        """Probes the GPUs at intervals, until cancelled."""
        failures = 0  # of probes in a row, because the host gave no session or did not answer in time
        for interval_s in stagger_intervals(self._spec.name, GPU_INTERVAL_S):
            await self._link.wait_up()
            was_idle = self._is_idle()
            commands = self._link.commands
            assert commands is not None, "the tunnel is up, so it has had a connection"
            timeout_s = find_gpu_timeout_s(self.reports.gpus)
            report = await probe_gpus(commands, timeout_s=timeout_s, node=self._spec.name)
            if self._link.is_up and self._link.commands is commands:  # otherwise the connection was lost meanwhile
                self._record_gpus(report, was_idle=was_idle)
            has_failed = report.answer in (Answer.NO_SESSION, Answer.ABANDONED)
            failures = failures + 1 if has_failed else 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(find_gpu_pause_s(report, interval_s, failures)):
                    await self._link.wait_down()

    def _is_idle(self) -> bool:
        """Whether the GPUs' utilisation now comes only from other programs."""
        return self._ledger.in_flight == 0 and self._clock() - self._ledger.last_release_at > IDLE_S

    def _record_gpus(self, report: GpuReport, *, was_idle: bool) -> None:
        """Stores the report. ``was_idle``: the node was idle when the probe began."""
        foreign_load = self.reports.foreign_load
        if was_idle and self._ledger.in_flight == 0:  # idle before and after the probe
            percentages = [gpu.utilization_pct for gpu in report.gpus if gpu.utilization_pct is not None]
            foreign_load = max(percentages) / 100.0 if percentages else None
        self.reports = replace(self.reports, gpus=report, foreign_load=foreign_load)
        power_w = sum(min(gpu.power_w or 0.0, MAX_GPU_POWER_W) for gpu in report.gpus)  # a host may report any figure
        self._ledger.account.activity.note_gpus(self._clock(), len(report.gpus), power_w)
        self._note_no_commands(report)
        self._end_first_round_when_complete()
        self._on_report()

    def _note_no_commands(self, report: GpuReport) -> None:
        """Logs once that the host runs no commands; again only after it has answered in between."""
        runs_no_commands = report.answer is Answer.NO_COMMANDS
        if runs_no_commands and not self._is_known_to_run_no_commands:
            log.info(
                "the GPUs of %s are not known: %s",
                self._spec.name,
                report.error,
                extra={"event": "no-commands", "node": self._spec.name},
            )
        if runs_no_commands or report.answer is Answer.COMPLETE:
            self._is_known_to_run_no_commands = runs_no_commands

    def _end_first_round_when_complete(self) -> None:
        """Ends the first round when the server and the GPUs have both been probed."""
        if self.reports.gpus is not None and self.reports.backend is not None:
            self._first_round_done.set()


def find_gpu_timeout_s(last_report: GpuReport | None) -> float:
    """The time-out of the next probe of the GPUs. A host whose nvidia-smi needs 8 s each time is slow, and not hung."""
    took_s = None if last_report is None else last_report.took_s
    if took_s is None:
        return GPU_TIMEOUT_S
    return min(max(GPU_TIMEOUT_S, GPU_PATIENCE_FACTOR * took_s), MAX_GPU_TIMEOUT_S)


def find_gpu_pause_s(report: GpuReport, interval_s: float, failures: int) -> float:
    """The time until the next probe of the GPUs. ``failures`` counts the probes in a row, this one included, for which
    the host gave no session or did not answer in time."""
    if report.answer is Answer.NO_COMMANDS:
        return NO_COMMANDS_INTERVAL_S
    if failures:
        return min(interval_s * 2.0 ** min(failures - 1, 10), max(interval_s, MAX_GPU_INTERVAL_S))
    return interval_s


def read_api_key(spec: NodeSpec) -> str | None:
    """The server's API key. It is read from its variable at each use, and is never stored. Raises SecretMissing."""
    variable = spec.backend.api_key_env
    return None if variable is None else config.read_secret(variable, node=spec.name)
