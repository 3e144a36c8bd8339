"""Runs a benchmark on the mesh of a Session, with a progress bar and the API keys of the configuration."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from gpumesh.cli.bench import load_way
from gpumesh.cli.first_report import FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.open_session import open_session, running_topology
from gpumesh.cli.views.figures import format_duration

if TYPE_CHECKING:
    from gpumesh.backends.base import ChatRequest
    from gpumesh.bench.failover.outage_plan import OutagePlan
    from gpumesh.bench.figures.cost import Prices
    from gpumesh.bench.load.conditions import Via
    from gpumesh.bench.load.route_arms import RouteAccess
    from gpumesh.bench.load.routes import ApiKeys
    from gpumesh.bench.load.samples import LoadSample
    from gpumesh.bench.load.send_prompt import AnswerStream, SendPrompt
    from gpumesh.bench.run import KeepResult
    from gpumesh.bench.stats import Objective
    from gpumesh.bench.workload.prompts import OwnPrompt
    from gpumesh.bench.workload.settings import BenchSettings, Scenario
    from gpumesh.bench.workload.stages import Stage
    from gpumesh.bench.workload.traces import TracedRequest
    from gpumesh.cli.bench.url_options import UrlOptions
    from gpumesh.cli.views.progress_bar import ProgressDisplay
    from gpumesh.daemon.sessions.session import Session
    from gpumesh.mesh.outages.outage import Outage
    from gpumesh.state import MeshState
    from gpumesh.topology import Topology


async def measure(
    options: GlobalOptions,
    scenario: Scenario,
    model: str | None,
    make_settings: Callable[[str], BenchSettings],
    objective: Objective,
    *,
    trace: Sequence[TracedRequest],
    own_prompts: Sequence[OwnPrompt],
    node: str | None,
    direct_urls: Mapping[str, str],
    outage: OutagePlan,
    via: Via | None = None,
    eur_per_kwh: float | None = None,
    repeat: int = 1,
    keep: KeepResult,
) -> None:
    """Measures the running mesh, or a mesh in this process if none runs. ``keep`` gets the result while it grows.

    Without ``model`` the default model is measured. ``make_settings`` gets the name of the model. ``trace``: the
    requests of the scenario ``replay``, ``own_prompts`` those of ``load``; else empty. ``node``: the only node to
    measure. ``via``: on which way the prompts go (``load_way.open_load``). ``direct_urls``: by the node's name, the URL
    of its server without its tunnel, for ``overhead``. ``outage``: for ``failover``. ``repeat``: how many times to run
    the scenario; ``keep`` gets a result that is not partial at the end of each run."""
    from gpumesh.bench import run as bench
    from gpumesh.daemon.sessions.local_session import LocalSession
    from gpumesh.mesh.models.default_model import choose_model

    async with (
        load_way.gateway_for_run() as give_gateway,
        open_session(options, change_topology=give_gateway) as session,
    ):
        topology = await running_topology(session, options)
        requested_model = model or topology.gateway.default_model
        state = await session.wait_first_report(FIRST_REPORT_TIMEOUT_S)
        model_name = requested_model or choose_model(state, node)
        target = _SessionTarget(session, embedded=isinstance(session, LocalSession))
        access = _route_access(topology, direct_urls)
        async with load_way.open_load(session, options, topology, via, access.keys, target.send()) as way:
            await _run_times(
                repeat,
                partial(
                    bench.run_benchmark,
                    target,
                    scenario,
                    make_settings(model_name),
                    objective=objective,
                    trace=trace,
                    own_prompts=own_prompts,
                    only_node=node,
                    access=access,
                    outage=outage,
                    load=way.load,
                    prices=_read_prices(topology, eur_per_kwh),
                    notes=way.notes,
                    keep=keep,
                ),
                quiet=options.quiet,
            )


async def measure_url(
    options: GlobalOptions,
    server: UrlOptions,
    scenario: Scenario,
    settings: BenchSettings,
    objective: Objective,
    *,
    trace: Sequence[TracedRequest],
    own_prompts: Sequence[OwnPrompt],
    repeat: int = 1,
    keep: KeepResult,
) -> None:
    """Measures a server that belongs to no mesh. The arguments are those of ``measure``."""
    from gpumesh.bench import run as bench
    from gpumesh.bench.load.load_sources import LoadOnUrl
    from gpumesh.bench.load.own_process.generator_link import GeneratorProcess

    target = server.target
    async with GeneratorProcess() as process:
        await _run_times(
            repeat,
            partial(
                bench.run_benchmark,
                target,
                scenario,
                settings,
                objective=objective,
                trace=trace,
                own_prompts=own_prompts,
                load=LoadOnUrl(process, target.url, server.api, server.read_key()),
                keep=keep,
            ),
            quiet=options.quiet,
        )


async def _run_times(repeat: int, run: Callable[..., Awaitable[object]], *, quiet: bool) -> None:
    """Runs a scenario so many times, with a progress bar. ``run`` takes ``progress`` and ``rng``."""
    with ExitStack() as stack:
        progress = _ProgressBar(stack, quiet=quiet, runs=repeat)
        for number in range(1, repeat + 1):
            progress.start_run(number)
            # Other nonces in each run: no prompt is in a server's cache.
            await run(progress=progress, rng=Random(time.time_ns()))


def _route_access(topology: Topology, direct_urls: Mapping[str, str]) -> RouteAccess:
    """What reaches the servers outside the mesh. Raises UsageError for a URL of a node that mesh.yaml does not have."""
    from gpumesh.bench.load.route_arms import RouteAccess
    from gpumesh.errors import unknown_node

    names = [node.name for node in topology.nodes]
    for name in direct_urls:
        if name not in names:
            raise unknown_node(name, names)
    return RouteAccess(_read_api_keys(topology), direct_urls)


def _read_prices(topology: Topology, eur_per_kwh: float | None) -> Prices:
    """The prices of the command line and of mesh.yaml."""
    from gpumesh.bench.figures.cost import Prices

    rents = {node.name: node.eur_per_hour for node in topology.nodes if node.eur_per_hour is not None}
    return Prices(eur_per_kwh, rents)


def _read_api_keys(topology: Topology) -> ApiKeys:
    """The API keys of the gateway and the nodes. Leaves out a key whose variable is not set: a server that needs a key
    and gets none reports that itself."""
    from gpumesh import config
    from gpumesh.bench.load.routes import ApiKeys
    from gpumesh.errors import SecretMissing

    def read_key(variable: str | None) -> str | None:
        try:
            return None if variable is None else config.read_secret(variable)
        except SecretMissing:  # the variable is not set
            return None

    node_keys: dict[str, str] = {}
    for node in topology.nodes:
        key = read_key(node.backend.api_key_env)
        if key is not None:
            node_keys[node.name] = key
    gateway_keys = [key for key in map(read_key, topology.gateway.key_variables) if key is not None]
    return ApiKeys(gateway_keys[0] if gateway_keys else None, node_keys)


class _SessionTarget:
    """The mesh behind a session, as a benchmark sees it. ``embedded``: the mesh runs in this process."""

    def __init__(self, session: Session, *, embedded: bool) -> None:
        self._session = session
        self.embedded = embedded

    def send(self) -> SendPrompt:
        """The function that sends a prompt through the mesh."""
        return self._send_prompt

    def _send_prompt(self, request: ChatRequest, node: str | None) -> AbstractAsyncContextManager[AnswerStream]:
        """Sends a prompt to ``node``, or to any node, and gives its answer as a context."""
        from gpumesh.balancer.base import Priority
        from gpumesh.daemon.sessions.session import PromptRequest

        prompt = PromptRequest(
            request.messages,
            model=request.model,
            node=node,
            priority=Priority.NORMAL,
            options=request.options,
            stream=request.stream,
            think=request.think,
        )
        return self._session.chat(prompt)

    async def status(self) -> MeshState:
        return await self._session.status()

    def watch(self, interval_s: float) -> AsyncIterator[MeshState]:
        return self._session.watch(interval_s)

    def hold(self, node: str, outage: Outage) -> AbstractAsyncContextManager[None]:
        return self._session.hold(node, outage)


class _ProgressBar:
    """A progress bar on stderr: how many requests of the stage that runs have ended. ``stack`` closes the bar."""

    def __init__(self, stack: ExitStack, *, quiet: bool, runs: int = 1) -> None:
        self._stack = stack
        self._quiet = quiet
        self._runs = runs  # how many times the scenario is run
        self._run_prefix = ""  # which run of several it is, for the stage's name
        self._display: ProgressDisplay | None = None  # there is no bar before the first stage
        self._stage = ""
        self._ended_count = 0  # the ended requests of this stage
        self._failed_count = 0  # of the whole run

    def start_run(self, number: int) -> None:
        """Shows from now on which run of several this is; the first one has the number 1."""
        if self._runs > 1:
            self._run_prefix = f"run {number} of {self._runs}: "

    def start_stage(self, stage: Stage) -> None:
        """Begins the bar anew, with the number of requests of this stage."""
        from gpumesh.cli.views.progress_bar import show_progress

        if self._display is None:
            self._display = self._stack.enter_context(show_progress(0, "requests", quiet=self._quiet))
        self._stage = self._run_prefix + stage.name
        if stage.open_loop:  # the bar's own estimate of the time left knows nothing of the schedule
            seconds = max((planned.at_s or 0.0 for planned in stage.requests), default=0.0)
            self._stage += f", sent over {format_duration(seconds)}"
        self._ended_count = 0
        self._display.begin(len(stage.requests))
        self._display(0, self._stage)

    def add_record(self, record: LoadSample) -> None:
        """Counts a request that has ended."""
        self._ended_count += 1
        if record.error_code is not None:
            self._failed_count += 1
        failed_text = f", {self._failed_count} failed" if self._failed_count else ""
        if self._display is not None:
            self._display(self._ended_count, f"{self._stage}{failed_text}")
