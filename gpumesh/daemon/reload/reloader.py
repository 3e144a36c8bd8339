"""``Reloader``: lets a running mesh take over what its mesh.yaml says now, on request or when the file has changed.

A reload reads the whole file in a thread, and then changes mesh and gateway in one step of the event loop: a request
sees either the old settings or the new ones. Whatever can fail comes before that step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpumesh.config.changed_file import describe_change, read_digest, read_snapshot
from gpumesh.config.comparison import ConfigSnapshot, KeyChange, describe_bad_file
from gpumesh.config.live_changes import LeavingNode, LivePlan, ReloadReport, plan_live_changes
from gpumesh.config.untrusted_file import untrusted_reason
from gpumesh.daemon.reload.file_follower import CHECK_INTERVAL_S, FileFollower, read_marks
from gpumesh.daemon.up_options import UpOptions, select_nodes
from gpumesh.errors import GPUMeshError, MeshNotRunning, UsageError
from gpumesh.gateway.observe.access_log import AccessLog
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.nodes.node_changes import AppliedChange
from gpumesh.state import Finding
from gpumesh.topology import ReloadMode, Topology
from gpumesh.tunnels.blocking import run_in_thread

if TYPE_CHECKING:
    from gpumesh.gateway.app import Gateway

log = logging.getLogger(__name__)

OWN_REPORT_S = 60.0  # for so long `gpumesh reload` tells what the mesh has taken over by itself
_NO_REPORT = (0.0, ReloadReport())


class Reloader:
    """Keeps a mesh in step with the file at ``path``. ``snapshot`` is what the mesh has taken over from it. ``options``
    are those of `up`. ``access_log``: where the gateway writes a line for each request, if mesh.yaml wants that.
    ``on_applied`` is called after each change."""

    def __init__(
        self,
        mesh: Mesh,
        path: Path,
        snapshot: ConfigSnapshot,
        *,
        options: UpOptions | None = None,
        access_log: Path | None = None,
        on_applied: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.snapshot = snapshot
        self.gateway: Gateway | None = None
        """The gateway over the mesh, as soon as it serves."""
        self._mesh = mesh
        self._path = path
        self._options = options or UpOptions()
        self._access_log = access_log
        self._on_applied = on_applied
        self._clock = clock
        self._reloading = asyncio.Lock()  # held during a reload
        self._requested = asyncio.Event()  # set by a request whose result goes to the log
        self._stopped = False  # nothing is taken over any more
        self._own_report = _NO_REPORT  # of the last change that nobody has requested, with its time
        self._was_trusted = _find_distrust(path) is None
        self._bad_file: Finding | None = None  # the file cannot be used, which is not reported yet
        self._refused_digest: str | None = None  # of the file that the last requested reload has refused

    def __repr__(self) -> str:
        return f"<Reloader {self._path} {'reloading' if self._reloading.locked() else 'idle'}>"

    # -- a reload ------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Takes over nothing from now on: the mesh is ending."""
        self._stopped = True

    def request(self) -> None:
        """Requests a reload, whose result goes to the log: for a signal."""
        self._requested.set()

    async def reload(self) -> ReloadReport:
        """As ``Session.reload``. Reloads run one after the other; each reads the file anew.

        If the mesh has just taken this file over by itself, the report is about that: the person who has saved the file
        wants to know what has become of it."""
        try:
            report = await self._reload()
        except MeshNotRunning:
            raise
        except GPUMeshError as error:
            self._refused_digest = await run_in_thread(read_digest, self._path)
            self._report_finding(describe_bad_file(error))
            raise
        self._refused_digest = None
        (made_at, own_report), self._own_report = self._own_report, _NO_REPORT
        age_s = self._clock() - made_at
        if own_report.applied and not report.applied and age_s < OWN_REPORT_S:
            return replace(own_report, age_s=age_s)
        return report

    async def _reload(self) -> ReloadReport:
        """Reads the file, takes it over, and logs what has changed. Raises GPUMeshError; then nothing has changed."""
        async with self._reloading:
            read = await run_in_thread(read_snapshot, self._path)
            if self._stopped:
                raise MeshNotRunning("the mesh is stopping and takes over no change")
            try:
                report = self._take_over(read)
            except OSError as error:  # no descriptor is left for a tunnel, for example
                raise GPUMeshError(f"the changes cannot be carried out: {error.strerror or error}") from error
        for line in report.lines():
            log.info("mesh.yaml: %s", line, extra={"event": "reload"})
        return report

    def _take_over(self, read: ConfigSnapshot) -> ReloadReport:
        """Changes mesh and gateway. Raises GPUMeshError and OSError; then nothing has changed."""
        mesh, gateway, running = self._mesh, self.gateway, self._mesh.file_topology
        wanted, not_opened = select_nodes(read.topology, self._options)
        plan = plan_live_changes(running, wanted)
        change = AppliedChange()
        if plan.differences:
            guard = None if gateway is None else gateway.read_guard(plan.topology)
            change = mesh.apply(plan.topology, limit_s=running.gateway.timeout_s)
            if gateway is not None and guard is not None:
                gateway.apply(guard)
                self._switch_access_log(gateway, running)
            self._on_applied()
        after_restart = self._note_snapshot(read, plan)
        self._report_finding(describe_change(self.snapshot.topology, read.topology))
        leaving = tuple(LeavingNode(name, count) for name, count in change.leaving.items())
        return ReloadReport(plan.differences, after_restart, not_opened, change.reopened, leaving)

    def _switch_access_log(self, gateway: Gateway, before: Topology) -> None:
        is_wanted = self._mesh.topology.gateway.access_log
        if self._access_log is not None and is_wanted is not before.gateway.access_log:
            gateway.replace_access_log(AccessLog(self._access_log) if is_wanted else None)

    def _note_snapshot(self, read: ConfigSnapshot, plan: LivePlan) -> tuple[KeyChange, ...]:
        """Stores what was taken over. Returns what the file says in addition."""
        by_file = plan_live_changes(self.snapshot.topology, read.topology)
        kept_keys = tuple(
            change for change in plan.after_restart if change.key in ("gateway.api_key_env", "gateway.keys")
        )
        after_restart = tuple(dict.fromkeys((*by_file.after_restart, *kept_keys)))
        live = plan.topology.gateway
        gateway = replace(by_file.topology.gateway, api_key_env=live.api_key_env, keys=live.keys)
        self.snapshot = ConfigSnapshot(replace(by_file.topology, gateway=gateway), "" if after_restart else read.digest)
        return after_restart

    def _report_finding(self, finding: Finding | None) -> None:
        """Shows the finding about the file in the mesh's state; ``None``: there is none."""
        self._bad_file = None
        before = {other.code: other.message for other in self._mesh.own_findings}
        if finding is not None and before.get(finding.code, finding.message) != finding.message:
            log.warning("%s", finding.message, extra={"event": "reload"})  # a new finding is logged in any case
        self._mesh.set_own_findings(() if finding is None else (finding,))

    # -- following the file --------------------------------------------------------------------------------------

    async def run(self, *, interval_s: float = CHECK_INTERVAL_S) -> None:
        """Carries out what is requested, and follows the file, until cancelled. Checks the file every ``interval_s``
        seconds, in a thread: it may be on a network disk that does not answer."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve_requests(), name="reloads on request")
            group.create_task(self._follow_file(interval_s), name="file")

    async def _serve_requests(self) -> None:
        """Reloads at each request, for ever. A failure goes to the log."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            try:
                await self.reload()
            except GPUMeshError as error:
                _log_failure(error)

    async def _follow_file(self, interval_s: float) -> None:
        """Handles each change of the file once the file has stayed the same for a while. Reports a file that cannot be
        used later still, so that a file that is being written is not reported."""
        follower = FileFollower(interval_s)
        while True:
            marks = await run_in_thread(read_marks, self._path)
            is_to_be_read = follower.note_marks(marks, self._clock())
            if is_to_be_read:
                await self._handle_changed_file()
            if self._bad_file is not None and follower.is_bad_file_due(self._clock()):
                self._report_finding(self._bad_file)
            await asyncio.sleep(interval_s)

    async def _handle_changed_file(self) -> None:
        """Takes the file over if mesh.yaml says ``reload: auto``; otherwise reports in what the file differs. Notes the
        reason in ``_bad_file`` if the file cannot be used."""
        digest = await run_in_thread(read_digest, self._path)
        if self._stopped or digest == self.snapshot.digest:
            self._report_finding(None)
            return
        if digest is not None and digest == self._refused_digest:  # the finding says already why
            return
        try:
            if self._mesh.topology.gateway.reload is ReloadMode.AUTO:
                await run_in_thread(self._require_same_trust)
                report = await self._reload()
                if report.applied:
                    self._own_report = (self._clock(), report)
            else:
                read = await run_in_thread(read_snapshot, self._path)
                if digest is None or digest != self._refused_digest:  # a reload may have refused it meanwhile
                    self._report_finding(describe_change(self.snapshot.topology, read.topology))
        except GPUMeshError as error:
            self._bad_file = describe_bad_file(error)

    def _require_same_trust(self) -> None:
        """Raises UsageError if another user may have written the file since the mesh was started: it can run any
        program, and nobody has looked at it."""
        reason = _find_distrust(self._path)
        if reason is not None and self._was_trusted:
            raise UsageError(
                f"{self._path} {reason}, so it is not taken over without being asked",
                hint="look at what it does; `gpumesh reload` takes it over",
            )


def _find_distrust(path: Path) -> str | None:
    """The reason why the file is not trusted (``untrusted_reason``); ``None`` for a file that is not there."""
    try:
        return untrusted_reason(path)
    except OSError:
        return None


def _log_failure(error: GPUMeshError) -> None:
    for line in error.message.splitlines():
        log.warning("mesh.yaml cannot be used now: %s", line, extra={"event": "reload"})
