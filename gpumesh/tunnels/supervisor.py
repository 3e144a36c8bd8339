"""Keeps one node's tunnel open: opens, watches and reopens it for as long as ``run`` runs.

lifecycle.py decides; this file acts. An SSH node's local ports (listeners.py) are bound once. Behind them, one worker
process at a time holds one connection. The connection is over when the worker reports its end (after a reset, at
once), when the worker ends, or when the host does not answer a ping (a network that drops all packets: within 5 s).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from gpumesh.errors import GPUMeshError, ReverseForwardRefused, SessionEnded, TunnelDown, TunnelError
from gpumesh.state import LocalAccess, TunnelPhase, TunnelState
from gpumesh.topology import DEFAULT_TUNNELS, NodeSpec, SshSpec, Target, TunnelsSpec
from gpumesh.tunnels.base import ClosableTunnel, ExecChunk, ExecResult, ProgramStream, ShellStream, Tunnel
from gpumesh.tunnels.base import Prompter as Prompter  # noqa: PLC0414 - callers of open_tunnel need both
from gpumesh.tunnels.connect_request import open_connect_request, recorded_fingerprints
from gpumesh.tunnels.direct.this_machine import ThisMachine
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from gpumesh.tunnels.lifecycle import (
    Cause,
    CloseRequested,
    Connected,
    ConnectionFailed,
    Decision,
    HoldReleased,
    HoldRequested,
    Lifecycle,
    LifecycleEvent,
    NetworkChanged,
    OpenRequested,
    RepairSeen,
    RetryDue,
    RetryRequested,
    Suspected,
    Woke,
    describe_life,
    step,
)
from gpumesh.tunnels.listeners import CLIENT_WAIT_S, Listeners
from gpumesh.tunnels.local_system.network_watch import watch_network, watch_sleep
from gpumesh.tunnels.local_system.repairs import RepairWatch
from gpumesh.tunnels.refused_users import log_refused_user
from gpumesh.tunnels.remote_commands.remote_shell import SHELL_COMMAND
from gpumesh.tunnels.transport import ConnectionInfo, ConnectRequest, ReverseForward
from gpumesh.tunnels.workers.connection_watch import follow_connection
from gpumesh.tunnels.workers.protocol import ForwardFailed
from gpumesh.tunnels.workers.worker_link import WorkerLink, cause_from_error, error_from_cause
from gpumesh.tunnels.workers.worker_pool import WorkerHandle, WorkerPool

CLOSE_S = 2.0  # the time for a worker to end its commands and close its connection
# The time for the worker of a lost connection to reset its clients. A killed worker would only close the clients'
# connections, and a cut answer may look whole.
LOST_CLOSE_S = 0.5

FORBIDDEN_HINT = "allow it in the host's sshd_config: AllowTcpForwarding yes (or local), and PermitOpen for the port"


def open_tunnel(
    spec: NodeSpec,
    *,
    clock: Callable[[], float] = time.monotonic,
    rng: random.Random | None = None,
    workers: WorkerPool,
    on_change: Callable[[TunnelState], None],
    prompter: Prompter | None = None,
    this_machine: ThisMachine | None = None,
    tunnels_spec: TunnelsSpec = DEFAULT_TUNNELS,
    mesh_name: str = "mesh",
    mesh_identity: str = "",
    reverse_forwards: Sequence[ReverseForward] = (),
) -> ClosableTunnel:
    """Makes a node's tunnel, and binds an SSH node's local ports. ``run_tunnel`` or ``Tunnel.run`` then opens it.

    ``clock`` returns monotonic seconds. ``rng`` spreads the retries. ``on_change`` gets every new state, on the event
    loop; it must not block. ``prompter`` asks a person; ``None``: no person is there. ``this_machine`` is shared by all
    nodes, so that they ask this machine only once. ``mesh_name`` is part of the names of Unix sockets, and host keys
    are recorded for ``mesh_identity``. ``reverse_forwards``, of an SSH node: while the tunnel is up, its host listens
    for each. Raises OSError and GPUMeshError when the local ends cannot be made.
    """
    if spec.ssh is None:
        assert not reverse_forwards, "programs of this machine connect to its ports themselves"
        return DirectTunnel(spec, clock=clock, on_change=on_change, this_machine=this_machine)
    return SshTunnel(
        spec,
        spec.ssh,
        clock=clock,
        rng=rng or random.Random(),
        workers=workers,
        on_change=on_change,
        prompter=prompter,
        tunnels_spec=tunnels_spec,
        mesh_name=mesh_name,
        mesh_identity=mesh_identity,
        reverse_forwards=reverse_forwards,
    )


@contextlib.asynccontextmanager
async def run_tunnel(tunnel: Tunnel) -> AsyncIterator[Tunnel]:
    """``async with run_tunnel(open_tunnel(…)) as tunnel``: runs the tunnel during the block, then closes it."""
    # Not a TaskGroup: an exception of the block should reach the caller unchanged, not in a group.
    task = asyncio.create_task(tunnel.run())
    try:
        yield tunnel
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class SshTunnel:
    """The tunnel of one SSH node; see ``base.Tunnel``. ``close`` is for a tunnel that never ran."""

    def __init__(
        self,
        spec: NodeSpec,
        ssh: SshSpec,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        workers: WorkerPool,
        on_change: Callable[[TunnelState], None],
        prompter: Prompter | None,
        client_wait_s: float = CLIENT_WAIT_S,
        tunnels_spec: TunnelsSpec = DEFAULT_TUNNELS,
        mesh_name: str = "mesh",
        mesh_identity: str = "",
        reverse_forwards: Sequence[ReverseForward] = (),
    ) -> None:
        self._node = spec.name
        self._mesh_identity = mesh_identity
        self._reverse_forwards = tuple(reverse_forwards)
        self._ssh = ssh
        self._targets = spec.backend.targets
        self._clock = clock
        self._rng = rng
        self._workers = workers
        self._on_change = on_change
        self._prompter = prompter
        self._client_wait_s = client_wait_s
        self._listeners = Listeners(self._targets, tunnels_spec, mesh_name=mesh_name, node=spec.name)
        self._life = Lifecycle()
        self._since: datetime | None = None  # when the present phase began
        self._rtt_ms: float | None = None  # ``None``: not measured on this connection
        self._host_keys: tuple[str, ...] = ()  # their fingerprints, the last time the host was reached
        self._repair_watch = RepairWatch(ssh)
        self._forbidden_targets: set[Target] = set()  # to which the present connection's host forbids forwarding
        self._link: WorkerLink | None = None  # ``None``: no worker runs
        self._without_session = False  # True after the host has ended a session of transport openssh
        # Decisions of the lifecycle, for the tasks that wait for them.
        self._reconnect = asyncio.Event()
        self._retry_wakeup = asyncio.Event()  # ends ``_wait_for_retry``, also when only the time of the retry changed
        self._check_requested = asyncio.Event()  # lets the round trip be measured now
        self._state_changed = asyncio.Event()  # set once, at the next change; then replaced

    def __repr__(self) -> str:
        return f"<SshTunnel {self._node} {self._life.phase.upper()} {self._life.reconnects} reconnects>"

    # -- the visible state -------------------------------------------------------------------------------------------

    @property
    def state(self) -> TunnelState:
        state = describe_life(self._life, self._rtt_ms, now=self._clock())
        return replace(
            state,
            transport=self._ssh.transport.value,
            since=self._since,
            local_port=self._listeners.ports[0] if self._listeners.ports else None,
            local_socket=str(self._listeners.paths[0]) if self._listeners.paths else None,
            local_access=self._listeners.access,
            host_keys=self._host_keys,
        )

    @property
    def urls(self) -> Mapping[Target, str]:
        return self._listeners.urls

    # -- requests ----------------------------------------------------------------------------------------------------

    async def wait_up(self) -> None:
        while self._life.phase is not TunnelPhase.UP:
            if self._life.phase is TunnelPhase.FAILED and self._life.cause is not None:  # always with a cause
                raise error_from_cause(self._life.cause, self._node)
            if self._life.phase is TunnelPhase.CLOSED:
                raise TunnelDown(f"the tunnel of {self._node} is closed", node=self._node)
            await self._state_changed.wait()

    async def exec(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        limit_bytes: int = 1 << 20,
        shareable: bool = False,  # noqa: ARG002 - no two SSH nodes are known to be one machine
    ) -> ExecResult:
        return await self._link_when_up().run_command(shlex.join(argv), timeout_s=timeout_s, limit_bytes=limit_bytes)

    async def exec_stream(self, argv: Sequence[str]) -> AsyncIterator[ExecChunk]:
        async with contextlib.aclosing(self._link_when_up().stream_command(shlex.join(argv))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def open_shell(self) -> ShellStream | None:
        return await self._link_when_up().open_shell(SHELL_COMMAND)

    async def open_program(self, argv: Sequence[str]) -> ProgramStream:
        return await self._link_when_up().open_program(shlex.join(argv))

    def suspect(self, reason: str) -> None:  # noqa: ARG002 - the caller has logged the reason
        self._handle_event(Suspected())

    def retry_now(self) -> None:
        self._handle_event(RetryRequested())

    @contextlib.contextmanager
    def held_closed(self) -> Iterator[None]:
        self._link_when_up()
        self._handle_event(HoldRequested())
        try:
            yield
        finally:
            self._handle_event(HoldReleased())

    def close(self) -> None:
        """Releases the local ports. ``run`` does that by itself when it ends."""
        self._listeners.close()

    def _link_when_up(self) -> WorkerLink:
        """The link to the worker. Raises TunnelDown when the tunnel is not up; its message has the cause if known."""
        if self._link is None or self._life.phase is not TunnelPhase.UP:
            reason = f": {self._life.cause.message}" if self._life.cause else ""
            raise TunnelDown(f"the tunnel of {self._node} is {self._life.phase.value}{reason}", node=self._node)
        return self._link

    # -- the state machine -------------------------------------------------------------------------------------------

    def _handle_event(self, event: LifecycleEvent) -> None:
        """Takes one step of the lifecycle, wakes the task that waits for the decision, and announces a new state."""
        old_life = self._life
        self._life, decision = step(old_life, event, now=self._clock(), jitter=self._rng.random())
        match decision:
            case Decision.CHECK:
                self._check_requested.set()
            case Decision.RECONNECT:
                self._reconnect.set()
            case Decision.CUT:
                if self._link is not None:
                    self._link.cut()
            case Decision.CONNECT | Decision.WAIT | Decision.STOP:
                self._retry_wakeup.set()
            case Decision.NOTHING:
                pass
        if self._life != old_life:
            if self._life.phase is not old_life.phase:
                self._since = datetime.now(UTC)
                self._listeners.follow_phase(old_life.phase, self._life.phase, self._client_wait_s)
            self._announce_state()

    def _announce_state(self) -> None:
        """Wakes the callers that wait in ``wait_up``, and gives the new state to ``on_change``."""
        changed_event, self._state_changed = self._state_changed, asyncio.Event()
        changed_event.set()
        self._on_change(self.state)

    async def run(self) -> None:
        """Opens the connection, and opens it again whenever it is lost, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(watch_sleep(lambda: self._handle_event(Woke())))
                group.create_task(watch_network(lambda: self._handle_event(NetworkChanged())))
                self._handle_event(OpenRequested())
                await self._connect_repeatedly()
        finally:
            self._handle_event(CloseRequested())
            self._listeners.close()

    async def _connect_repeatedly(self) -> None:
        """Makes one connection after another, with the pauses that the lifecycle decides. Never returns."""
        while True:
            self._reconnect.clear()
            self._repair_watch.note_attempt()
            cause = await self._run_connection()
            if cause is not None:  # without a cause, the lifecycle wants the next attempt at once: it is not waiting
                if cause.code == SessionEnded.code:
                    # The host would end the session of the next connection, too. So that one opens no session.
                    self._without_session = True
                if cause.code == ReverseForwardRefused.code and self._life.connects:
                    # The host's sshd may not know yet that the last connection, which has the port, is gone.
                    cause = replace(cause, needs_person=False)
                self._handle_event(ConnectionFailed(cause))
            while self._life.waiting:
                await self._wait_for_retry()

    async def _wait_for_retry(self) -> None:
        """Waits for the time of the next attempt, and then reports it as due. Returns early at a new decision. A tunnel
        that is held has no such time."""
        retry_at = self._life.retry_at
        self._retry_wakeup.clear()
        code = self._life.cause.code if self._life.cause is not None else ""
        wait_s = None if retry_at is None else max(0.0, retry_at - self._clock())
        async with asyncio.TaskGroup() as group:
            repair_task = group.create_task(self._repair_watch.watch(code, lambda: self._handle_event(RepairSeen())))
            try:
                async with asyncio.timeout(wait_s):
                    await self._retry_wakeup.wait()
            except TimeoutError:
                self._handle_event(RetryDue())
            repair_task.cancel()

    # -- one connection ----------------------------------------------------------------------------------------------

    async def _run_connection(self) -> Cause | None:
        """Makes one connection, waits for its end and returns the cause; ``None``: the lifecycle decided RECONNECT."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                setup = await stack.enter_async_context(
                    open_connect_request(
                        self._node,
                        self._ssh,
                        self._targets,
                        interactive=self._prompter is not None,
                        # Only with OWN_USER does the worker have to refuse the connections of other users.
                        share=self._listeners.access is not LocalAccess.OWN_USER,
                        mesh=self._mesh_identity,
                        without_session=self._without_session,
                        reverse_forwards=self._reverse_forwards,
                    )
                )
                worker = await self._workers.spawn(setup, self._listeners.sockets)
            except TunnelError as error:
                return cause_from_error(error)
            except (GPUMeshError, OSError) as error:  # no folder for sockets, out of processes or descriptors
                return Cause("tunnel", f"the tunnel of {self._node} cannot be started: {error}")
            async with worker:
                return await self._run_worker(setup, worker)

    async def _run_worker(self, setup: ConnectRequest, worker: WorkerHandle) -> Cause | None:
        """Follows the connection of ``worker`` and returns as ``_run_connection``. Ends the worker in any case."""
        link = WorkerLink(
            self._node,
            worker,
            prompter=self._prompter,
            on_connected=lambda info: self._on_connected(setup, info),
            on_forward_failed=self._on_forward_failed,
            on_peer_refused=lambda refused: log_refused_user(self._node, refused),
        )
        self._link = link
        self._forbidden_targets.clear()
        close_timeout_s = LOST_CLOSE_S
        try:
            return await follow_connection(
                link,
                self._ssh,
                node=self._node,
                give_up=self._reconnect,
                check_requested=self._check_requested,
                on_rtt_ms=self._on_rtt_ms,
            )
        except asyncio.CancelledError:  # the tunnel is closed; its connection may still work
            close_timeout_s = CLOSE_S
            raise
        finally:
            self._link = None
            try:
                if link.connected.is_set():  # otherwise the worker has no clients, and nothing runs on the host
                    await link.close(close_timeout_s)
            finally:
                worker.kill()

    # -- reports of the connection -----------------------------------------------------------------------------------

    def _on_rtt_ms(self, rtt_ms: float) -> None:
        self._rtt_ms = rtt_ms
        self._announce_state()

    def _on_connected(self, setup: ConnectRequest, info: ConnectionInfo) -> None:
        self._rtt_ms = info.rtt_ms
        self._host_keys = recorded_fingerprints(setup)
        self._check_requested.clear()  # an earlier request was about an earlier connection
        self._handle_event(Connected())

    def _on_forward_failed(self, failed: ForwardFailed) -> None:
        """Ends the connection when the host has forbidden forwarding to every target. Ignores any other failure: the
        prober reports a backend that does not answer."""
        if failed.code != "forwarding-forbidden" or self._link is None:
            return
        self._forbidden_targets.add(failed.target)
        if self._forbidden_targets >= set(self._targets):
            self._link.finish(Cause("forwarding-forbidden", failed.message, FORBIDDEN_HINT, needs_person=True))
