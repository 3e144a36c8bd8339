"""Keeps one node's tunnel: opens, watches, reopens, for as long as ``run`` runs.

What to do is decided by lifecycle.py; here it is done. An SSH node's local ports (listeners.py) are bound once; behind
them one worker process at a time holds one connection. That connection is dead when the worker says so (a reset, at
once), when the worker ends, or when the host leaves a question unanswered (a black hole, within 5 s).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shlex
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from gpumesh import config
from gpumesh.cancellation import raise_if_cancelled
from gpumesh.config import providers
from gpumesh.errors import GPUMeshError, TransportUnsupported, TunnelDown, TunnelError
from gpumesh.state import LocalAccess, TunnelPhase, TunnelState
from gpumesh.topology import DEFAULT_TUNNELS, NodeSpec, SshSpec, Target, TransportKind, TunnelsSpec
from gpumesh.tunnels import hostkeys
from gpumesh.tunnels.address_command import ask_address
from gpumesh.tunnels.base import ExecChunk, ExecResult, Tunnel
from gpumesh.tunnels.base import Prompter as Prompter  # noqa: PLC0414 - who opens a tunnel needs both
from gpumesh.tunnels.direct.this_machine import ThisMachine
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from gpumesh.tunnels.lifecycle import (
    Cause,
    CloseRequested,
    Connected,
    ConnectionFailed,
    Decision,
    Lifecycle,
    LifecycleEvent,
    NetworkChanged,
    OpenRequested,
    RetryDue,
    RetryRequested,
    Suspected,
    Woke,
    step,
)
from gpumesh.tunnels.listeners import Listeners
from gpumesh.tunnels.local_system.network_watch import watch_network, watch_sleep
from gpumesh.tunnels.local_system.socket_folders import private_folder
from gpumesh.tunnels.transport import ConnectionInfo, ConnectRequest
from gpumesh.tunnels.workers.protocol import ForwardFailed, PeerRefused
from gpumesh.tunnels.workers.worker_link import WorkerLink, cause_from_error, error_from_cause
from gpumesh.tunnels.workers.worker_pool import WorkerPool

log = logging.getLogger(__name__)

NOTICE_S = 4.5  # a dead peer is noticed within this, if the keepalive interval leaves room for it
LEAST_PATIENCE_S = 1.5  # for an answer: a lost packet or two must not end a connection that lives
CLIENT_WAIT_S = 8.0  # how long clients of a local port wait for a tunnel that is away
CLOSE_S = 2.0
LOST_CLOSE_S = 0.5  # for the worker of a lost connection to reset its clients: killed, it would seem to end them
RTT_WEIGHT = 0.3  # of the newest round trip in what is shown


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
) -> Tunnel:
    """The tunnel of a node, with its local ports bound. Its caller runs ``run`` in a task, or uses ``run_tunnel``.

    ``clock`` gives monotonic seconds. ``on_change`` gets every new state, on the event loop; it must not block.
    ``this_machine`` is shared by all that need not be told twice what this machine says. ``mesh_name`` names Unix
    sockets. Raises OSError and GPUMeshError when there are no local ends to be had.
    """
    if spec.ssh is None:
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
    )


@contextlib.asynccontextmanager
async def run_tunnel(tunnel: Tunnel) -> AsyncIterator[Tunnel]:
    """``async with running(open_tunnel(…)) as tunnel``: runs it inside, and has closed it after."""
    # Not a TaskGroup: what the block raises should reach its caller as it is, not in a group.
    task = asyncio.create_task(tunnel.run())
    try:
        yield tunnel
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class SshTunnel:
    """One SSH node's tunnel; see ``base.Tunnel``. ``close`` is for one that never ran."""

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
    ) -> None:
        self._node = spec.name
        self._ssh = ssh
        self._targets = spec.backend.targets
        self._clock = clock
        self._rng = rng
        self._workers = workers
        self._on_change = on_change
        self._ask = prompter
        self._grace_s = client_wait_s
        self._listeners = Listeners(self._targets, tunnels_spec, mesh_name=mesh_name, node=spec.name)
        self._life = Lifecycle()
        self._since: datetime | None = None
        self._rtt_ms: float | None = None
        self._forbidden: set[Target] = set()
        self._talk: WorkerLink | None = None
        self._restart: asyncio.Event = asyncio.Event()
        self._go = asyncio.Event()
        self._check = asyncio.Event()
        self._changed = asyncio.Event()
        self._patience_ends: asyncio.TimerHandle | None = None
        self._reached = ssh
        self._host_keys: tuple[str, ...] = ()

    # -- what is seen ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> TunnelState:
        life = self._life
        up = life.phase is TunnelPhase.UP
        cause = life.cause
        return TunnelState(
            transport=self._ssh.transport.value,
            state=life.phase,
            since=self._since,
            rtt_ms=self._rtt_ms if up else None,
            reconnects=life.reconnects,
            last_error=cause.message if cause else None,
            error_code=cause.code if cause and not up else None,
            hint=cause.hint if cause and not up else None,
            retry_in_s=max(0.0, life.retry_at - self._clock()) if life.retry_at is not None else None,
            local_port=self._listeners.ports[0] if self._listeners.ports else None,
            local_socket=str(self._listeners.paths[0]) if self._listeners.paths else None,
            local_access=self._listeners.access,
            host_keys=self._host_keys,
        )

    @property
    def urls(self) -> Mapping[Target, str]:
        return self._listeners.urls

    # -- what may be asked -------------------------------------------------------------------------------------------

    async def wait_up(self) -> None:
        while self._life.phase is not TunnelPhase.UP:
            if self._life.phase is TunnelPhase.FAILED and self._life.cause is not None:
                raise error_from_cause(self._life.cause, self._node)
            if self._life.phase is TunnelPhase.CLOSED:
                raise TunnelDown(f"the tunnel of {self._node} is closed", node=self._node)
            await self._changed.wait()

    async def exec(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        limit_bytes: int = 1 << 20,
        shareable: bool = False,  # noqa: ARG002 - each host is its own
    ) -> ExecResult:
        return await self._up_now().run_command(shlex.join(argv), timeout_s=timeout_s, limit_bytes=limit_bytes)

    async def exec_stream(self, argv: Sequence[str]) -> AsyncIterator[ExecChunk]:
        async with contextlib.aclosing(self._up_now().stream_command(shlex.join(argv))) as chunks:
            async for chunk in chunks:
                yield chunk

    def suspect(self, reason: str) -> None:  # noqa: ARG002 - whoever suspects has said it in its own log
        self._feed(Suspected())

    def retry_now(self) -> None:
        self._feed(RetryRequested())

    def close(self) -> None:
        """Gives the local ports back. ``run`` does so by itself when it ends."""
        self._listeners.close()

    def _up_now(self) -> WorkerLink:
        if self._talk is None or self._life.phase is not TunnelPhase.UP:
            why = f": {self._life.cause.message}" if self._life.cause else ""
            raise TunnelDown(f"the tunnel of {self._node} is {self._life.phase.value}{why}", node=self._node)
        return self._talk

    # -- the state machine, driven -----------------------------------------------------------------------------------

    def _feed(self, event: LifecycleEvent) -> None:
        before = self._life
        self._life, decision = step(before, event, now=self._clock(), jitter=self._rng.random())
        match decision:
            case Decision.CHECK:
                self._check.set()
            case Decision.RECONNECT:
                self._restart.set()
            case Decision.CONNECT | Decision.WAIT | Decision.STOP:
                self._go.set()
            case Decision.NOTHING:
                pass
        if self._life != before:
            if self._life.phase is not before.phase:
                self._since = datetime.now(UTC)
                self._serve_waiting_clients(before.phase)
            self._announce()

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._on_change(self.state)

    def _serve_waiting_clients(self, before: TunnelPhase) -> None:
        """Clients of the local ports wait while a tunnel is away for a moment, and are reset while it is for longer."""
        phase = self._life.phase
        if phase is TunnelPhase.UP:
            self._stop_patience()
            self._listeners.hold_clients()
        elif phase is TunnelPhase.FAILED:
            self._stop_patience()
            self._listeners.reset_clients()
        elif before in (TunnelPhase.IDLE, TunnelPhase.UP) and phase is not TunnelPhase.CLOSED:
            loop = asyncio.get_running_loop()
            self._patience_ends = loop.call_later(self._grace_s, self._listeners.reset_clients)

    def _stop_patience(self) -> None:
        if self._patience_ends is not None:
            self._patience_ends.cancel()
            self._patience_ends = None

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(watch_sleep(lambda: self._feed(Woke())))
                group.create_task(watch_network(lambda: self._feed(NetworkChanged())))
                self._feed(OpenRequested())
                await self._live()
        finally:
            self._feed(CloseRequested())
            self._stop_patience()
            self._listeners.close()

    async def _live(self) -> None:
        while True:
            self._restart.clear()
            cause = await self._hold_one_connection()
            if cause is not None:
                self._feed(ConnectionFailed(cause))
            while self._life.waiting:
                await self._wait_for_retry()

    async def _wait_for_retry(self) -> None:
        assert self._life.retry_at is not None, "waiting has an end"
        self._go.clear()
        try:
            async with asyncio.timeout(max(0.0, self._life.retry_at - self._clock())):
                await self._go.wait()
        except TimeoutError:
            self._feed(RetryDue())

    # -- one connection ----------------------------------------------------------------------------------------------

    async def _hold_one_connection(self) -> Cause | None:
        """Connects and stays until it is over; why it is. ``None``: it is to be tried anew at once (RECONNECT)."""
        with contextlib.ExitStack() as stack:
            try:
                setup = await self._setup(stack)
                worker = await self._workers.spawn(setup, self._listeners.sockets)
            except TunnelError as error:
                return cause_from_error(error)
            except (GPUMeshError, OSError) as error:  # no folder for sockets, out of processes or descriptors
                return Cause("tunnel", f"the tunnel of {self._node} cannot be started: {error}")
            async with worker:
                talk = WorkerLink(
                    self._node,
                    worker,
                    prompter=self._ask,
                    on_connected=self._is_up,
                    on_forward_failed=self._forward_failed,
                    on_peer_refused=self._peer_refused,
                )
                patience_s = LOST_CLOSE_S
                try:
                    cause = await self._attend(talk)
                except asyncio.CancelledError:
                    patience_s = CLOSE_S
                    raise
                finally:
                    self._talk = None
                    try:
                        if talk.connected.is_set():  # else there are no clients, and nothing on the host
                            await talk.close(patience_s)
                    finally:
                        worker.kill()
                return cause

    async def _attend(self, talk: WorkerLink) -> Cause | None:
        self._talk = talk
        self._forbidden.clear()
        cause: Cause | None = None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(talk.receive_messages(group))
                group.create_task(self._watch(talk))
                cause = await self._over(talk, group)
                # Ends the group's tasks, questions to a person among them, without a cancellation from outside.
                raise _Over
        except* _Over:
            pass
        finally:
            talk.finish(Cause("tunnel-lost", "the tunnel is closing"))
        raise_if_cancelled()
        return cause

    async def _over(self, talk: WorkerLink, group: asyncio.TaskGroup) -> Cause | None:
        restart = group.create_task(self._restart.wait())
        either: list[asyncio.Future[Any]] = [talk.end_cause, restart]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return talk.end_cause.result() if talk.end_cause.done() else None

    async def _setup(self, stack: contextlib.ExitStack) -> ConnectRequest:
        """Raises SecretMissing, HostUnresolved (address_from), TransportUnsupported (a host that cannot do it), and
        GPUMeshError when there is no folder for sockets."""
        ssh = self._ssh
        if ssh.address_from is not None:
            host, port = await ask_address(ssh.address_from, default_port=ssh.port, node=self._node)
            ssh = replace(ssh, host=host, port=port)
        proxy = providers.describe_terminal_proxy(ssh.host)
        if proxy is not None:
            raise TransportUnsupported(proxy, hint=providers.EXPOSED_TCP_HINT, node=self._node)
        self._reached = ssh
        secrets = [
            (name, config.read_secret(variable, node=self._node))
            for name, variable in (("password", ssh.password_env), ("passphrase", ssh.passphrase_env))
            if variable is not None
        ]
        control_dir: str | None = None
        if ssh.transport is TransportKind.OPENSSH:
            control_dir = str(stack.enter_context(private_folder()))
        return ConnectRequest(
            node=self._node,
            ssh=ssh,
            targets=self._targets,
            secrets=tuple(secrets),
            interactive=self._ask is not None,
            control_dir=control_dir,
            share=self._listeners.access is not LocalAccess.OWN_USER,
        )

    def _is_up(self, up: ConnectionInfo) -> None:
        self._rtt_ms = up.rtt_ms
        self._host_keys = self._keys_on_record()
        self._check.clear()
        self._feed(Connected())

    def _keys_on_record(self) -> tuple[str, ...]:
        """Whichever transport was used: a host that was let in has shown one of these."""
        ssh = self._reached
        try:
            keys = hostkeys.read_known_hosts(ssh.known_hosts).keys(node=self._node, host=ssh.host, port=ssh.port)
        except TunnelError:  # who the host is remains unknown; that it was let in is settled
            return ()
        return tuple(key.fingerprint for key in keys)

    def _forward_failed(self, failed: ForwardFailed) -> None:
        """A backend that is not there is the prober's to say. A host that forbids forwarding is no way to any."""
        if failed.code != "forwarding-forbidden" or self._talk is None:
            return
        self._forbidden.add(failed.target)
        if self._forbidden >= set(self._targets):
            hint = "allow it in the host's sshd_config: AllowTcpForwarding yes (or local), and PermitOpen for the port"
            cause = Cause("forwarding-forbidden", failed.message, hint, needs_person=True)
            self._talk.finish(cause)

    def _peer_refused(self, refused: PeerRefused) -> None:
        """At most once a minute for each user; see peer_users.py."""
        who = f"uid {refused.uid}" if refused.name is None else f"{refused.name} (uid {refused.uid})"
        log.warning(
            "user %s tried to connect to port %d, the local end of %s's tunnel, and was reset: it is for your own user"
            " and root; `tunnels: {share: true}` in mesh.yaml opens it to all users of this machine",
            who,
            refused.port,
            self._node,
            extra={"event": "local-user-refused", "node": self._node},
        )

    async def _watch(self, talk: WorkerLink) -> None:
        """Ends the conversation when connecting takes too long, or when the host does not answer any more."""
        await self._connect_in_time(talk)
        interval_s = self._ssh.keepalive_s
        smooth_ms: float | None = None
        self._check.set()  # the round trip that the worker measured was that of a connection just made
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._check.wait()
            self._check.clear()
            patience_s = max(LEAST_PATIENCE_S, NOTICE_S - interval_s)
            rtt_ms = await talk.ping(patience_s)
            if rtt_ms is None:
                message = f"{self._node} has not answered for {patience_s:.1f} s"
                talk.finish(Cause("tunnel-lost", message, "the host, its network or yours is away; it is tried again"))
                return
            smooth_ms = rtt_ms if smooth_ms is None else smooth_ms + RTT_WEIGHT * (rtt_ms - smooth_ms)
            self._rtt_ms = round(smooth_ms, 3)
            self._announce()

    async def _connect_in_time(self, talk: WorkerLink) -> None:
        """The worker keeps ``connect_timeout_s`` for each step; this is for a worker that does not. While a person is
        being asked something the time does not count."""
        limit_s = self._ssh.connect_timeout_s * (2 + len(self._ssh.proxy_jump)) + 10.0
        spent_s = 0.0
        while spent_s < limit_s:
            try:
                async with asyncio.timeout(1.0):
                    await talk.connected.wait()
                    return
            except TimeoutError:
                spent_s += 0.0 if talk.open_prompts else 1.0
        talk.finish(Cause("connect-timeout", f"no connection to {self._node} within {limit_s:.0f} s"))
        await talk.connected.wait()  # never: ``_attend`` ends this task


class _Over(Exception):
    """The conversation is over; not an error."""
