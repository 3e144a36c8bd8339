"""``PoolPlanner``: asks a pool's hosts what they offer now, and plans the pool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from gpumesh.errors import GPUMeshError, PoolDoesNotFit, PoolError, PoolMemberAway, TunnelError
from gpumesh.mesh.mesh import Mesh
from gpumesh.pool_spec import PoolMember, PoolSpec
from gpumesh.pools.base import HostOffer, PoolPlan, WorkerPath
from gpumesh.pools.hosts.model_files import ModelFile, read_model
from gpumesh.pools.hosts.offers import FindBandwidth, host_offer
from gpumesh.pools.hosts.programs import HostPrograms, check_versions, find_programs
from gpumesh.pools.hosts.worker_login import WorkerLogin
from gpumesh.pools.planning.gpu_rates import find_bytes_per_s, learn_bytes_per_s
from gpumesh.pools.planning.plan import plan_pool
from gpumesh.pools.running.members import MemberHost, reach_members
from gpumesh.pools.running.path_finder import PathFinder
from gpumesh.probes.commands.host_commands import HostCommands
from gpumesh.probes.nvidia_smi import GpuReport, probe_gpus
from gpumesh.state import LoadedModel
from gpumesh.tunnels.base import ExecResult, ShellStream

GPU_TIMEOUT_S = 15.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolHosts:
    """What is known of a pool's hosts. ``errors``: why the other members can take no part now."""

    hosts: Mapping[str, MemberHost]
    programs: Mapping[str, HostPrograms]
    offers: tuple[HostOffer, ...]
    paths: Mapping[str, WorkerPath]
    model: ModelFile
    draft: ModelFile | None
    errors: Mapping[str, GPUMeshError]
    logins: Mapping[str, WorkerLogin] = field(default_factory=dict)
    """How the head logs in to the workers for which that is the better way."""


@dataclass(frozen=True, slots=True)
class PreparedPool:
    """A plan that fits, and what its start needs. ``unload``: the nodes whose Ollama must unload its models first."""

    spec: PoolSpec
    plan: PoolPlan
    hosts: PoolHosts
    unload: tuple[str, ...] = ()


class PoolPlanner:
    """Asks the members of a pool through the tunnels of ``mesh``. ``clock`` returns monotonic seconds."""

    def __init__(self, mesh: Mesh, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._mesh = mesh
        self._clock = clock
        self._paths = PathFinder(mesh, clock=clock)

    async def plan(self, spec: PoolSpec) -> PoolPlan:
        """Returns the plan for people, which may say that the pool does not fit, or what its hosts lack. Raises
        GPUMeshError if the head cannot be asked, or the model cannot be read."""
        hosts = await self._ask_hosts(spec)
        plan = _plan(spec, hosts, hosts.offers)
        try:
            check_programs(plan, hosts)
        except PoolError as error:
            hint = () if error.hint is None else (error.hint,)
            plan = replace(plan, problems=(*plan.problems, error.message), advice=(*plan.advice, *hint))
        return plan

    async def prepare(self, spec: PoolSpec, lost: frozenset[str]) -> PreparedPool:
        """Plans a start of the pool, without the nodes ``lost`` if it fits without them. Raises GPUMeshError, also if
        the pool does not fit."""
        hosts = await self._ask_hosts(spec)
        prepared = choose_plan(spec, hosts, lost)
        check_programs(prepared.plan, hosts)
        return prepared

    # -- asking --------------------------------------------------------------------------------------------------

    async def _ask_hosts(self, spec: PoolSpec) -> PoolHosts:
        hosts, errors = await reach_members(self._mesh, spec)
        if spec.head in errors:
            raise _head_away(spec, errors[spec.head])
        head = hosts[spec.head]
        async with asyncio.TaskGroup() as group:
            found = group.create_task(_gather(hosts, self._find_programs(spec)))
            reports = group.create_task(_gather(hosts, self._ask_gpus))
            model = group.create_task(_attempt(read_model(head.route, spec.model, node=spec.head)))
            draft = None
            if spec.draft_model is not None:
                draft = group.create_task(_attempt(read_model(head.route, spec.draft_model, node=spec.head)))
        model_file, draft_file = _require(model.result()), None if draft is None else _require(draft.result())
        programs: dict[str, HostPrograms] = {}
        for node, result in found.result().items():
            if isinstance(result, GPUMeshError):
                errors[node] = result
            else:
                programs[node] = result
        if spec.head in errors:
            raise errors[spec.head]
        offers = tuple(
            self._make_offer(member, programs.get(member.node), reports.result().get(member.node), errors)
            for member in spec.members
        )
        usable = {node: host for node, host in hosts.items() if node in programs}
        routes = await self._paths.find(head, [host for node, host in usable.items() if node != spec.head])
        paths = {
            node: replace(route.path, protocol=None if (rpc := programs[node].rpc) is None else rpc[0])
            for node, route in routes.items()
        }
        logins = {node: route.login for node, route in routes.items() if route.login is not None}
        return PoolHosts(usable, programs, offers, paths, model_file, draft_file, errors, logins)

    def _find_programs(self, spec: PoolSpec) -> Callable[[MemberHost], Awaitable[HostPrograms]]:
        async def find(host: MemberHost) -> HostPrograms:
            return await find_programs(host.route, host.node.name, llama_cpp_dir=spec.llama_cpp_dir)

        return find

    async def _ask_gpus(self, host: MemberHost) -> GpuReport:
        # Not the mesh's last report: it may be from before the pool's own programs have ended.
        commands = HostCommands(_WithoutShell(host), clock=self._clock)
        return await probe_gpus(commands, timeout_s=GPU_TIMEOUT_S, node=host.node.name)

    def _make_offer(
        self,
        member: PoolMember,
        programs: HostPrograms | None,
        report: GpuReport | GPUMeshError | None,
        errors: Mapping[str, GPUMeshError],
    ) -> HostOffer:
        if programs is None or not isinstance(report, GpuReport):
            error = errors.get(member.node) or report
            message, hint = (
                (error.message, error.hint) if isinstance(error, GPUMeshError) else ("it is not known", None)
            )
            return HostOffer(member.node, problem=message, hint=hint)
        return host_offer(
            report,
            member,
            programs,
            loaded=self._loaded_models(member.node),
            find_bandwidth=self._find_bandwidth(member.node),
        )

    def _find_bandwidth(self, node: str) -> FindBandwidth:
        """Knows the GPUs of the table. For others, and for a CPU, it uses what the node's own server has decoded."""
        account = self._mesh.fleet.find_node(node).account
        sizes = {model: mib << 20 for model, mib in account.residency.file_mib.items()}
        token_s = {model: rates.token_s for model, rates in account.rates.measured().items()}
        learned = learn_bytes_per_s(sizes, token_s)
        return lambda device: find_bytes_per_s(device) or learned

    def _loaded_models(self, node: str) -> tuple[LoadedModel, ...]:
        """The models that the node's own server has in memory, by its last report."""
        return self._mesh.fleet.find_node(node).state(queued=0).backend.loaded


# -- planning --------------------------------------------------------------------------------------------------------


def _plan(spec: PoolSpec, hosts: PoolHosts, offers: Sequence[HostOffer]) -> PoolPlan:
    draft = None if hosts.draft is None else hosts.draft.shape
    return plan_pool(spec, hosts.model.shape, offers, hosts.paths, draft=draft)


def choose_plan(spec: PoolSpec, hosts: PoolHosts, lost: frozenset[str]) -> PreparedPool:
    """The first plan that fits: without the lost nodes, and without asking Ollama to unload anything, if possible."""
    without_lost = tuple(_leave_out(offer, lost - {spec.head}) for offer in hosts.offers)
    for offers in dict.fromkeys((without_lost, hosts.offers)):
        for unload in dict.fromkeys((False, spec.unload)):
            plan = _plan(replace(spec, unload=unload), hosts, offers)
            if plan.fits:
                return PreparedPool(spec, plan, hosts, _find_unload(plan) if unload else ())
    raise _does_not_fit(plan, hosts.errors)


def _head_away(spec: PoolSpec, error: GPUMeshError) -> PoolMemberAway:
    away = PoolMemberAway(f"the head cannot be reached: {error.message}", hint=error.hint, node=spec.head)
    away.needs_person = isinstance(error, TunnelError) and error.needs_person
    away.unreachable = frozenset({spec.head})
    return away


def _leave_out(offer: HostOffer, lost: frozenset[str]) -> HostOffer:
    return replace(offer, devices=(), problem="it was lost before") if offer.node in lost else offer


def _find_unload(plan: PoolPlan) -> tuple[str, ...]:
    """The nodes on whose GPUs the plan needs memory that Ollama holds."""
    return tuple(
        member.node
        for member in plan.members
        if any(share.needed_bytes > share.device.free_bytes and share.device.held_by_others for share in member.shares)
    )


def _does_not_fit(plan: PoolPlan, errors: Mapping[str, GPUMeshError]) -> PoolDoesNotFit:
    away = {node: error for node, error in errors.items() if isinstance(error, TunnelError)}
    reasons = [f"{node} cannot take part: {error.message}" for node, error in errors.items()]
    hint = "; ".join(plan.advice[:2]) or None
    if away:
        hint = f"it is tried again when {', '.join(away)} can be reached"
    error = PoolDoesNotFit("; ".join((*reasons, *plan.problems)), hint=hint)
    error.unreachable = frozenset(away)
    return error


def check_programs(plan: PoolPlan, hosts: PoolHosts) -> None:
    """Raises PoolProgramMissing and PoolVersionsDiffer if the plan's hosts lack a program, or differ."""
    if not plan.members:
        return
    used = {plan.head.node, *(worker.node for worker in plan.workers)}
    programs = {node: found for node, found in hosts.programs.items() if node in used}
    programs[plan.head.node].need_server()
    for worker in plan.workers:
        programs[worker.node].need_rpc_server()
    check_versions(programs, plan.head.node)


# -- asking several hosts at once ------------------------------------------------------------------------------------


async def _attempt(work: Awaitable[T]) -> T | GPUMeshError:
    try:
        return await work
    except GPUMeshError as error:
        return error


def _require(result: T | GPUMeshError) -> T:
    if isinstance(result, GPUMeshError):
        raise result
    return result


async def _gather(
    hosts: Mapping[str, MemberHost], ask: Callable[[MemberHost], Awaitable[T]]
) -> dict[str, T | GPUMeshError]:
    """The answers of all hosts, by node; the error of a host that gives none."""
    answers = await asyncio.gather(*(_attempt(ask(host)) for host in hosts.values()))
    return dict(zip(hosts, answers, strict=True))


class _WithoutShell:
    """Runs each script in a session of its own, because the host is asked only once."""

    def __init__(self, host: MemberHost) -> None:
        self._route = host.route

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult:
        return await self._route.exec(argv, timeout_s=timeout_s, limit_bytes=limit_bytes, shareable=shareable)

    async def open_shell(self) -> ShellStream | None:
        return None
