"""Faults of a GPU host, its network and our own processes: how each starts, how it ends, and what gpumesh must do.
test_chaos.py asserts that gpumesh does it; benchmarks/faults.py measures how quickly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from gpumesh.gateway.app import Gateway
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import TunnelPhase
from gpumesh.topology import AddressCommand, BackendSpec, GatewaySpec, NodeSpec, Target, Topology, TransportKind
from tests.real import process_resources
from tests.real.far_host import MODEL, FarHost, HostProcess, lively_host
from tests.real.load import Load, NodeObservation, NodeWatch
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import keygen

VICTIMS = tuple(kind.value for kind in TransportKind)
MESH = "chaos"
STEADY = "steady"
LOGINS = 10
BOUND_S = 60.0


class NoticedBy(StrEnum):
    """Which part of a node has to notice a fault."""

    TUNNEL = "tunnel"
    BACKEND = "backend"
    """The tunnel stays up, but the server behind it is down."""
    NOTHING = "nothing"
    """The fault does no harm, and nothing may react to it."""


@dataclass(frozen=True)
class NetworkLine:
    """The network to the host is slow and loses packets in both directions; and there is no other host."""

    round_trip_s: float
    lost_of_1000: int


@dataclass
class FaultSetup:
    """A host with a node for each transport (``VICTIMS``), another host that stays healthy, a mesh and a gateway over
    all of them, and clients that send requests."""

    folder: Path
    host: FarHost
    mesh: Mesh
    watch: NodeWatch
    load: Load
    holding: list[asyncio.StreamWriter] = field(default_factory=list)

    def retry_tunnels(self) -> None:
        for node in VICTIMS:
            self.mesh.tunnel(node).retry_now()


FaultAction = Callable[[FaultSetup], Awaitable[None]]


@dataclass(frozen=True)
class InjectedFault:
    """``error_code``: the error code that the tunnel shows before it is over. ``lift`` ends it, and recovery counts
    from there; without one the host is well again at once, and recovery counts from ``strike``. ``cleanup`` comes
    last."""

    name: str
    strike: FaultAction
    lift: FaultAction | None = None
    error_code: str = "tunnel-lost"
    noticed_by: NoticedBy = NoticedBy.TUNNEL
    goal_s: float = 1.0
    lasts_s: float = 0.0
    cleanup: FaultAction | None = None
    line: NetworkLine | None = None


# -- starting and ending faults --------------------------------------------------------------------------------------


async def do_nothing(setup: FaultSetup) -> None:
    """The fault exists from the start."""


async def kill_sessions(setup: FaultSetup) -> None:
    await setup.host.kill_sessions()


async def kill_listener(setup: FaultSetup) -> None:
    await setup.host.kill_listener()


async def kill_sshd(setup: FaultSetup) -> None:
    await setup.host.kill_listener()
    await setup.host.kill_sessions()


async def start_sshd(setup: FaultSetup) -> None:
    await setup.host.sshd.start()


async def freeze_sessions(setup: FaultSetup) -> None:
    setup.host.signal(setup.host.sessions(), signal.SIGSTOP)


async def thaw_sessions(setup: FaultSetup) -> None:
    setup.host.signal(setup.host.sessions(), signal.SIGCONT)


async def freeze_sshd(setup: FaultSetup) -> None:
    setup.host.signal({setup.host.listener}, signal.SIGSTOP)
    await freeze_sessions(setup)


async def thaw_sshd(setup: FaultSetup) -> None:
    setup.host.signal({setup.host.listener}, signal.SIGCONT)
    await thaw_sessions(setup)


async def reset(setup: FaultSetup) -> None:
    await setup.host.net.reset(setup.host.sshd.port)


async def swallow(setup: FaultSetup) -> None:
    await setup.host.net.swallow()


async def heal(setup: FaultSetup) -> None:
    await setup.host.net.heal()


async def pull_out(setup: FaultSetup) -> None:
    await setup.host.net.pull_out()


async def plug_in(setup: FaultSetup) -> None:
    await setup.host.net.plug_in()


async def move_port(setup: FaultSetup) -> None:
    setup.host.sshd.port += 1
    publish_address(setup.folder, setup.host.sshd.address, setup.host.sshd.port)
    await setup.host.restart_sshd()


async def change_key(setup: FaultSetup) -> None:
    sshd = setup.host.sshd
    sshd.host_key = keygen(sshd.folder / "another_host_key")
    await setup.host.restart_sshd()


async def trust(setup: FaultSetup) -> None:
    await setup.host.trust(*VICTIMS, mesh=MESH)
    setup.retry_tunnels()


async def exhaust_logins(setup: FaultSetup) -> None:
    """Opens as many connections without a login as sshd accepts; then cuts the connections that had logged in."""
    logged_in = setup.host.sessions()
    connected = setup.host.connections()
    for _ in range(LOGINS):
        _, writer = await asyncio.open_connection(setup.host.sshd.address, setup.host.sshd.port)
        setup.holding.append(writer)
    await wait_until(lambda: setup.host.connections() >= connected + LOGINS, "all of sshd's slots for logins in use")
    setup.host.signal(logged_in, signal.SIGKILL)


async def free_logins(setup: FaultSetup) -> None:
    while setup.holding:
        setup.holding.pop().close()


async def forbid_forwarding(setup: FaultSetup) -> None:
    await setup.host.restart_sshd(AllowTcpForwarding="no")


async def allow_forwarding(setup: FaultSetup) -> None:
    await setup.host.restart_sshd(AllowTcpForwarding="yes")
    setup.retry_tunnels()


async def stop_ollama(setup: FaultSetup) -> None:
    await setup.host.stop_ollama()


async def start_ollama(setup: FaultSetup) -> None:
    await setup.host.start_ollama()


async def kill_workers(setup: FaultSetup) -> None:
    setup.host.signal(process_resources.workers(os.getpid()), signal.SIGKILL)


async def kill_zygote(setup: FaultSetup) -> None:
    setup.host.signal(process_resources.zygotes(os.getpid()), signal.SIGKILL)


FAULTS = (
    InjectedFault("sshd's session killed (kill -9)", kill_sessions),
    InjectedFault(
        "sshd's listener killed (kill -9)", kill_listener, start_sshd, noticed_by=NoticedBy.NOTHING, lasts_s=5.0
    ),
    InjectedFault("sshd killed, listener and sessions", kill_sshd, start_sshd, error_code="connect-refused"),
    InjectedFault("sshd's session frozen (SIGSTOP)", freeze_sessions, goal_s=5.0, cleanup=thaw_sessions),
    InjectedFault("the host hangs (all of sshd frozen)", freeze_sshd, thaw_sshd, goal_s=5.0),
    InjectedFault("connection reset (RST)", reset),
    InjectedFault("black hole, both ways", swallow, heal, goal_s=5.0),
    InjectedFault("outage", swallow, heal, goal_s=5.0, lasts_s=6.0),
    InjectedFault(
        "200 ms, 5 % of packets lost", do_nothing, noticed_by=NoticedBy.NOTHING, lasts_s=15.0, line=NetworkLine(0.2, 50)
    ),
    InjectedFault("cable pulled, and plugged in again", pull_out, plug_in, goal_s=5.0),
    InjectedFault("port moved (a pod restarted)", move_port),
    InjectedFault("host key changed", change_key, trust, error_code="host-key-changed"),
    InjectedFault("MaxStartups reached", exhaust_logins, free_logins, error_code="connect-refused"),
    InjectedFault("AllowTcpForwarding no", forbid_forwarding, allow_forwarding, error_code="forwarding-forbidden"),
    InjectedFault("Ollama killed and started again", stop_ollama, start_ollama, noticed_by=NoticedBy.BACKEND),
    InjectedFault("our tunnel processes killed (kill -9)", kill_workers),
    InjectedFault("the process that starts them killed, too", kill_zygote),
)


# -- running a fault----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FaultResult:
    """One fault on one node. ``noticed_s``: until the mesh sent it no more requests. ``recovered_s``: from the fault's
    end until it got requests again. ``None``: never, which is right for a fault that nothing should notice."""

    fault: str
    transport: str
    noticed_s: float | None
    recovered_s: float | None
    reconnects: int
    same_port: bool
    answers: int
    failures: tuple[str, ...]
    slowest_s: float


def publish_address(folder: Path, host: str, port: int) -> None:
    """Makes ``address_from`` print this address from now on."""
    (folder / "address").write_text(f"{host} {port}\n")


@contextlib.asynccontextmanager
async def fault_setup(folder: Path, *, line: NetworkLine | None = None, clients: int = 8) -> AsyncIterator[FaultSetup]:
    """Ready when both transports are up and the clients have had their first answers."""
    async with contextlib.AsyncExitStack() as stack:
        host = FarHost(folder)
        host.sshd.options["MaxStartups"] = f"{LOGINS}:100:{LOGINS}"
        await stack.enter_async_context(host)
        await host.trust(*VICTIMS, mesh=MESH)
        address = host.sshd.address
        if line is not None:
            far = host.net.long_line(round_trip_s=line.round_trip_s, lost_of_1000=line.lost_of_1000)
            address = await stack.enter_async_context(far)
        publish_address(folder, address, host.sshd.port)
        where = AddressCommand(("cat", str(folder / "address")))
        nodes = [host.node(kind.value, kind, address_from=where) for kind in TransportKind]
        if line is None:
            steady = await stack.enter_async_context(HostProcess(lively_host(STEADY)))
            nodes.append(NodeSpec(STEADY, BackendSpec(targets=(Target("127.0.0.1", steady.port),))))
        topology = Topology(MESH, tuple(nodes), GatewaySpec(port=0, default_model=MODEL))
        mesh = await stack.enter_async_context(Mesh(topology))
        gateway = await stack.enter_async_context(Gateway(mesh, drain_s=1.0))
        await wait_until(lambda: len(mesh.usable_nodes()) == len(nodes), "all nodes usable")
        watch = await stack.enter_async_context(NodeWatch(mesh, list(VICTIMS)).running())
        load = await stack.enter_async_context(Load(gateway.url, MODEL).running(clients))
        await load.wait_for_answers(2 * clients)
        yield FaultSetup(folder, host, mesh, watch, load)


async def run_fault(setup: FaultSetup, fault: InjectedFault) -> list[FaultResult]:
    """Starts and ends the fault, with requests all the time. Raises ``TimeoutError`` when an expected state does not
    come within ``BOUND_S``."""
    before = {node: setup.watch.now(node) for node in VICTIMS}
    setup.load.slowest_s = 0.0
    answers, failures = setup.load.answers, len(setup.load.failures)
    started_at = time.monotonic()
    await fault.strike(setup)
    noticed = {node: await _wait_noticed(setup, fault, node, started_at) for node in VICTIMS}
    await asyncio.sleep(max(0.0, started_at + fault.lasts_s - time.monotonic()))
    lifted_at = started_at
    if fault.lift is not None:
        await fault.lift(setup)
        lifted_at = time.monotonic()
    recovered = {node: await _wait_recovered(setup, node, noticed[node], lifted_at) for node in VICTIMS}
    if fault.cleanup is not None:
        await fault.cleanup(setup)
    await setup.load.wait_for_answers(20)
    return [
        FaultResult(
            fault=fault.name,
            transport=node,
            noticed_s=_seconds_until(started_at, noticed[node]),
            recovered_s=_seconds_until(lifted_at, recovered[node]),
            reconnects=setup.watch.now(node).reconnects - before[node].reconnects,
            same_port=setup.watch.now(node).port == before[node].port,
            answers=setup.load.answers - answers,
            failures=tuple(setup.load.failures[failures:]),
            slowest_s=setup.load.slowest_s,
        )
        for node in VICTIMS
    ]


async def _wait_noticed(
    setup: FaultSetup, fault: InjectedFault, node: str, started_at: float
) -> NodeObservation | None:
    """The first observation of the loss; waits until the node shows the true reason."""

    def is_the_reason(observation: NodeObservation) -> bool:
        return observation.code == fault.error_code

    def is_down(observation: NodeObservation) -> bool:
        return observation.phase is not TunnelPhase.UP

    if fault.noticed_by is NoticedBy.NOTHING:
        await asyncio.sleep(max(0.0, started_at + fault.lasts_s - time.monotonic()))
        return setup.watch.first(node, started_at, is_down)
    if fault.noticed_by is NoticedBy.BACKEND:
        return await setup.watch.wait(node, started_at, lambda observation: not observation.usable, within_s=BOUND_S)
    await setup.watch.wait(node, started_at, is_the_reason, within_s=BOUND_S)
    return setup.watch.first(node, started_at, is_down)


async def _wait_recovered(
    setup: FaultSetup, node: str, noticed: NodeObservation | None, lifted_at: float
) -> NodeObservation | None:
    if noticed is None:
        return None
    since = max(noticed.at, lifted_at)
    return await setup.watch.wait(
        node, since, lambda observation: observation.usable and observation.phase is TunnelPhase.UP, within_s=BOUND_S
    )


def _seconds_until(moment: float, observation: NodeObservation | None) -> float | None:
    return None if observation is None else observation.at - moment
