"""What happens to a GPU host, its network and our own processes: each fault with how it comes, how it ends, and what
gpumesh must make of it. test_chaos.py asserts that it does; benchmarks/faults.py measures how quickly."""

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
from gpumesh.lab.lab import LabHost
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import TunnelPhase
from gpumesh.topology import AddressCommand, BackendSpec, GatewaySpec, NodeSpec, Target, Topology, TransportKind
from tests.real import belongings
from tests.real.far_host import MODEL, FarHost, lively_host
from tests.real.load import Load, NodeObservation, NodeWatch
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import keygen

VICTIMS = tuple(kind.value for kind in TransportKind)
STEADY = "steady"
LOGINS = 10
BOUND_S = 60.0


class NoticedBy(StrEnum):
    """Whose business a fault is."""

    TUNNEL = "tunnel"
    BACKEND = "backend"
    """The tunnel stays up: the server behind it is away."""
    NOBODY = "nobody"
    """It does no harm, and must not be taken for one."""


@dataclass(frozen=True)
class NetworkLine:
    """The way to the host is long and loses packets, each way; and there is no other host to go to."""

    round_trip_s: float
    lost_of_1000: int


@dataclass
class FaultSetup:
    """A host whose node is there once for each transport (``VICTIMS``), and another host, which stays well; a mesh and
    a gateway over all of them; clients at work."""

    folder: Path
    host: FarHost
    mesh: Mesh
    watch: NodeWatch
    load: Load
    holding: list[asyncio.StreamWriter] = field(default_factory=list)

    def nudge(self) -> None:
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


# -- how each comes and goes -----------------------------------------------------------------------------------------


async def do_nothing(stage: FaultSetup) -> None:
    """It is there from the start."""


async def kill_sessions(stage: FaultSetup) -> None:
    await stage.host.kill_sessions()


async def kill_listener(stage: FaultSetup) -> None:
    await stage.host.kill_listener()


async def kill_sshd(stage: FaultSetup) -> None:
    await stage.host.kill_listener()
    await stage.host.kill_sessions()


async def start_sshd(stage: FaultSetup) -> None:
    await stage.host.sshd.start()


async def freeze_sessions(stage: FaultSetup) -> None:
    stage.host.signal(stage.host.sessions(), signal.SIGSTOP)


async def thaw_sessions(stage: FaultSetup) -> None:
    stage.host.signal(stage.host.sessions(), signal.SIGCONT)


async def freeze_sshd(stage: FaultSetup) -> None:
    stage.host.signal({stage.host.listener}, signal.SIGSTOP)
    await freeze_sessions(stage)


async def thaw_sshd(stage: FaultSetup) -> None:
    stage.host.signal({stage.host.listener}, signal.SIGCONT)
    await thaw_sessions(stage)


async def reset(stage: FaultSetup) -> None:
    await stage.host.net.reset(stage.host.sshd.port)


async def swallow(stage: FaultSetup) -> None:
    await stage.host.net.swallow()


async def heal(stage: FaultSetup) -> None:
    await stage.host.net.heal()


async def pull_out(stage: FaultSetup) -> None:
    await stage.host.net.pull_out()


async def plug_in(stage: FaultSetup) -> None:
    await stage.host.net.plug_in()


async def move_port(stage: FaultSetup) -> None:
    stage.host.sshd.port += 1
    publish_address(stage.folder, stage.host.sshd.address, stage.host.sshd.port)
    await stage.host.restart_sshd()


async def change_key(stage: FaultSetup) -> None:
    sshd = stage.host.sshd
    sshd.host_key = keygen(sshd.folder / "another_host_key")
    await stage.host.restart_sshd()


async def trust(stage: FaultSetup) -> None:
    await stage.host.trust(*VICTIMS)
    stage.nudge()


async def exhaust_logins(stage: FaultSetup) -> None:
    """As many connections that never log in as sshd takes; then those that had logged in are cut."""
    logged_in = stage.host.sessions()
    connected = stage.host.connections()
    for _ in range(LOGINS):
        _, writer = await asyncio.open_connection(stage.host.sshd.address, stage.host.sshd.port)
        stage.holding.append(writer)
    await wait_until(lambda: stage.host.connections() >= connected + LOGINS, "sshd's places for logins all taken")
    stage.host.signal(logged_in, signal.SIGKILL)


async def free_logins(stage: FaultSetup) -> None:
    while stage.holding:
        stage.holding.pop().close()


async def forbid_forwarding(stage: FaultSetup) -> None:
    await stage.host.restart_sshd(AllowTcpForwarding="no")


async def allow_forwarding(stage: FaultSetup) -> None:
    await stage.host.restart_sshd(AllowTcpForwarding="yes")
    stage.nudge()


async def stop_ollama(stage: FaultSetup) -> None:
    await stage.host.stop_ollama()


async def start_ollama(stage: FaultSetup) -> None:
    await stage.host.start_ollama()


async def kill_workers(stage: FaultSetup) -> None:
    stage.host.signal(belongings.workers(os.getpid()), signal.SIGKILL)


async def kill_zygote(stage: FaultSetup) -> None:
    stage.host.signal(belongings.zygotes(os.getpid()), signal.SIGKILL)


FAULTS = (
    InjectedFault("sshd's session killed (kill -9)", kill_sessions),
    InjectedFault(
        "sshd's listener killed (kill -9)", kill_listener, start_sshd, noticed_by=NoticedBy.NOBODY, lasts_s=5.0
    ),
    InjectedFault("sshd killed, listener and sessions", kill_sshd, start_sshd, error_code="connect-refused"),
    InjectedFault("sshd's session frozen (SIGSTOP)", freeze_sessions, goal_s=5.0, cleanup=thaw_sessions),
    InjectedFault("the host hangs (all of sshd frozen)", freeze_sshd, thaw_sshd, goal_s=5.0),
    InjectedFault("connection reset (RST)", reset),
    InjectedFault("black hole, both ways", swallow, heal, goal_s=5.0),
    InjectedFault("outage", swallow, heal, goal_s=5.0, lasts_s=6.0),
    InjectedFault(
        "200 ms, 5 % of packets lost", do_nothing, noticed_by=NoticedBy.NOBODY, lasts_s=15.0, line=NetworkLine(0.2, 50)
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


# -- the play --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FaultResult:
    """Of one fault on one node. ``noticed_s``: until the mesh gave it no more requests. ``recovered_s``: from the
    fault's end until it got requests again. ``None``: never, which is right where nobody should notice."""

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
    """What ``address_from`` prints from now on."""
    (folder / "address").write_text(f"{host} {port}\n")


@contextlib.asynccontextmanager
async def fault_setup(folder: Path, *, line: NetworkLine | None = None, clients: int = 8) -> AsyncIterator[FaultSetup]:
    """When both transports are up and the clients have had their first answers."""
    async with contextlib.AsyncExitStack() as stack:
        host = FarHost(folder)
        host.sshd.options["MaxStartups"] = f"{LOGINS}:100:{LOGINS}"
        await stack.enter_async_context(host)
        await host.trust(*VICTIMS)
        address = host.sshd.address
        if line is not None:
            far = host.net.long_line(round_trip_s=line.round_trip_s, lost_of_1000=line.lost_of_1000)
            address = await stack.enter_async_context(far)
        publish_address(folder, address, host.sshd.port)
        where = AddressCommand(("cat", str(folder / "address")))
        nodes = [host.node(kind.value, kind, address_from=where) for kind in TransportKind]
        if line is None:
            steady = await stack.enter_async_context(LabHost(lively_host(STEADY), folder, authorized=()))
            nodes.append(NodeSpec(STEADY, BackendSpec(targets=(Target("127.0.0.1", steady.backend_port),))))
        topology = Topology("chaos", tuple(nodes), GatewaySpec(port=0, default_model=MODEL))
        mesh = await stack.enter_async_context(Mesh(topology))
        gateway = await stack.enter_async_context(Gateway(mesh, drain_s=1.0))
        await wait_until(lambda: len(mesh.usable_nodes()) == len(nodes), "all nodes usable")
        watch = await stack.enter_async_context(NodeWatch(mesh, list(VICTIMS)).running())
        load = await stack.enter_async_context(Load(gateway.url, MODEL).running(clients))
        await load.wait_for_answers(2 * clients)
        yield FaultSetup(folder, host, mesh, watch, load)


async def run_fault(stage: FaultSetup, fault: InjectedFault) -> list[FaultResult]:
    """The fault, from before it to after it, with requests all the time. Raises ``TimeoutError`` when something that
    must come does not come within ``BOUND_S``."""
    before = {node: stage.watch.now(node) for node in VICTIMS}
    stage.load.slowest_s = 0.0
    answers, failures = stage.load.answers, len(stage.load.failures)
    began = time.monotonic()
    await fault.strike(stage)
    noticed = {node: await _noticed(stage, fault, node, began) for node in VICTIMS}
    await asyncio.sleep(max(0.0, began + fault.lasts_s - time.monotonic()))
    lifted = began
    if fault.lift is not None:
        await fault.lift(stage)
        lifted = time.monotonic()
    recovered = {node: await _recovered(stage, node, noticed[node], lifted) for node in VICTIMS}
    if fault.cleanup is not None:
        await fault.cleanup(stage)
    await stage.load.wait_for_answers(20)
    return [
        FaultResult(
            fault=fault.name,
            transport=node,
            noticed_s=_between(began, noticed[node]),
            recovered_s=_between(lifted, recovered[node]),
            reconnects=stage.watch.now(node).reconnects - before[node].reconnects,
            same_port=stage.watch.now(node).port == before[node].port,
            answers=stage.load.answers - answers,
            failures=tuple(stage.load.failures[failures:]),
            slowest_s=stage.load.slowest_s,
        )
        for node in VICTIMS
    ]


async def _noticed(stage: FaultSetup, fault: InjectedFault, node: str, began: float) -> NodeObservation | None:
    """The first sign of it, once the node shows its true reason."""

    def is_the_reason(seen: NodeObservation) -> bool:
        return seen.code == fault.error_code

    def is_down(seen: NodeObservation) -> bool:
        return seen.phase is not TunnelPhase.UP

    if fault.noticed_by is NoticedBy.NOBODY:
        await asyncio.sleep(max(0.0, began + fault.lasts_s - time.monotonic()))
        return stage.watch.first(node, began, is_down)
    if fault.noticed_by is NoticedBy.BACKEND:
        return await stage.watch.wait(node, began, lambda seen: not seen.usable, within_s=BOUND_S)
    await stage.watch.wait(node, began, is_the_reason, within_s=BOUND_S)
    return stage.watch.first(node, began, is_down)


async def _recovered(
    stage: FaultSetup, node: str, noticed: NodeObservation | None, lifted: float
) -> NodeObservation | None:
    if noticed is None:
        return None
    since = max(noticed.at, lifted)
    return await stage.watch.wait(
        node, since, lambda seen: seen.usable and seen.phase is TunnelPhase.UP, within_s=BOUND_S
    )


def _between(moment: float, seen: NodeObservation | None) -> float | None:
    return None if seen is None else seen.at - moment
