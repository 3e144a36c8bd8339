"""A running mesh: what it shows, and that each request ends once, whatever happens to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import ConfigError, ExecError, GPUMeshError, ModelMissing, NoNodeError, UsageError
from gpumesh.lab.profile import Faults, ModelProfile
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.nodes import prober
from gpumesh.mesh.requests.answer import Answer
from gpumesh.mesh.requests.delivery import RequestDelivery
from gpumesh.state import GatewayPhase, GatewayState, Health
from gpumesh.topology import BackendKind, NodeSpec, PolicyKind, Topology
from tests.mesh.meshes import BODIES, MODEL, frames, host, make_call, mesh_of_hosts, mesh_of_nodes, node, send, text_of
from tests.tunnels.polling import wait_until

TAGS = dict.fromkeys(BackendKind, HttpCall("GET", "/api/tags"))


def named(name: str) -> HttpCall:
    return make_call(messages=[{"role": "user", "content": name}])


# -- what is seen ----------------------------------------------------------------------------------------------------


async def test_the_first_report_knows_every_node() -> None:
    async with mesh_of_hosts(host("a"), host("b")) as lab:
        specs = (node("a", lab.hosts["a"].url), node("gone", "http://127.0.0.1:9"))
        async with Mesh(Topology("home", specs)) as mesh:
            state = await mesh.wait_first_report(10.0)
            assert state.mesh == "home"
            health = {node_state.name: node_state.health for node_state in state.nodes}
            assert health["a"] in (Health.HEALTHY, Health.DEGRADED)
            assert health["gone"] is Health.DOWN
            assert state.totals.nodes == 2
            assert mesh.usable_nodes() == ("a",)
            assert mesh.usable_nodes(frozenset({BackendKind.OPENAI})) == ()
            assert [candidate.name for candidate in mesh.candidates()] == ["a", "gone"]


async def test_at_the_deadline_the_first_report_has_what_is_known() -> None:
    async with Mesh(Topology("home", (node("gone", "http://127.0.0.1:9"),))) as mesh:
        state = await mesh.wait_first_report(0.0)
        assert [node_state.name for node_state in state.nodes] == ["gone"]


async def test_wait_usable_returns_a_node_or_raises_as_soon_as_none_can_serve() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        assert await mesh.mesh.wait_usable("m", timeout_s=5.0) == "a"
        with pytest.raises(ModelMissing):
            await mesh.mesh.wait_usable("other", timeout_s=60.0)
        with pytest.raises(UsageError, match="there is no node 'x'"):
            await mesh.mesh.wait_usable("m", timeout_s=5.0, node="x")
    async with Mesh(Topology("home", (node("gone", "http://127.0.0.1:9"),))) as lost:
        with pytest.raises(NoNodeError, match="gone: "):
            await lost.wait_usable("m", timeout_s=60.0)


async def test_requests_in_flight_and_in_the_queue_are_counted_apart() -> None:
    async with mesh_of_hosts(host("a", slots=1, tokens_per_s=50.0), max_parallel=1) as mesh:
        answer = await send(mesh.mesh, make_call())
        waits = asyncio.create_task(send(mesh.mesh, make_call()))
        await wait_until(lambda: mesh.mesh.snapshot().gateway.queued == 1, "a second waits")
        shown = mesh.mesh.snapshot()
        assert (shown.gateway.in_flight, shown.gateway.queued) == (1, 1)
        assert shown.gateway.waiting[0].model == "m"
        await answer.aclose()
        await (await waits).aclose()
        assert mesh.mesh.in_flight == 0


async def test_the_snapshot_has_the_state_that_the_gateway_set() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        changes = mesh.mesh.watch_changes()
        await anext(changes)
        mesh.mesh.set_gateway_state(GatewayState("http://127.0.0.1:1", GatewayPhase.SERVING))
        await anext(changes)
        assert mesh.mesh.snapshot().gateway.url == "http://127.0.0.1:1"


async def test_a_drained_node_gets_no_new_request_and_finishes_its_own() -> None:
    async with mesh_of_hosts(host("a", tokens_per_s=100.0), host("b")) as mesh:
        on_a = await send(mesh.mesh, make_call())
        mesh.mesh.drain("a")
        assert mesh.mesh.snapshot().nodes[0].health is Health.DRAINING
        for _ in range(3):
            answer = await send(mesh.mesh, make_call())
            await answer.read()
            assert answer.node == "b"
        assert on_a.node == "a"
        assert text_of(await on_a.read())
        mesh.mesh.resume("a")
        answer = await send(mesh.mesh, make_call())
        assert answer.node == "a"
        await answer.aclose()


async def test_a_model_that_was_added_is_known_after_a_refresh() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        mesh.hosts["a"].engine.store["new:1b"] = (
            ModelProfile("new:1b"),
            next(stored for _, stored in mesh.hosts["a"].engine.store.values()),
        )
        await mesh.mesh.refresh(["a"])
        assert "new:1b" in (mesh.mesh.snapshot().nodes[0].backend.models or ())


async def test_a_name_that_mesh_yaml_does_not_have_is_an_error() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        for ask in (mesh.mesh.drain, mesh.mesh.resume, mesh.mesh.tunnel):
            with pytest.raises(UsageError, match="there is no node"):
                ask("x")
        with pytest.raises(UsageError):
            mesh.mesh.chat("m", "x", node="x")


async def test_a_disabled_node_is_shown_and_never_used() -> None:
    async with mesh_of_hosts(host("a")) as lab:
        disabled = node("off", lab.hosts["a"].url)
        disabled = NodeSpec(disabled.name, disabled.backend, enabled=False)
        async with mesh_of_nodes(disabled, node("a", lab.hosts["a"].url)) as mesh:
            assert mesh.mesh.usable_nodes() == ("a",)
            with pytest.raises(UsageError, match=r"disabled in mesh\.yaml"):
                mesh.mesh.tunnel("off")


async def test_commands_run_only_where_the_server_is() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        # The stand-in runs in this very process, which is "here"; a name in mesh.yaml that leads nowhere is not.
        result = await mesh.mesh.exec("a", ["echo", "hello"], timeout_s=10.0)
        assert result.stdout == b"hello\n"
        with pytest.raises(ExecError):
            await mesh.mesh.exec("a", ["gpumesh-has-no-such-command"], timeout_s=10.0)


def test_from_file_raises_all_problems_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("version: 1\nnodes:\n  - name: a\n    backend: {prot: 1}\n  - nam: b\n")
    with pytest.raises(ConfigError) as wrong:
        Mesh.from_file(file)
    assert len(wrong.value.problems) >= 2


async def test_repr_tells_the_state() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        await (await send(mesh.mesh, make_call())).read()
        assert repr(mesh.mesh) == "<Mesh test 0 in flight, 1 served, <Fleet 1 nodes, 1 reachable>>"
        delivery = RequestDelivery(mesh.mesh._send_context, Demand("m"), TAGS, timeout_s=1.0, resume=True)
        assert repr(delivery) == "<RequestDelivery model m attempt 0 failed: none>"


# -- requests --------------------------------------------------------------------------------------------------------


async def test_a_request_without_inference_is_not_counted() -> None:
    async with mesh_of_hosts(host("a")) as mesh:
        answer = await mesh.mesh.send(Demand(None, needs_slot=False), TAGS, timeout_s=5.0)
        assert MODEL.encode() in await answer.read()
        assert mesh.mesh.request_counters.accepted == 0
        assert mesh.mesh.snapshot().nodes[0].load.served == 0


async def test_priorities_decide_who_is_next() -> None:
    async with mesh_of_hosts(host("a", slots=1, tokens_per_s=200.0), max_parallel=1) as mesh:
        holder = await send(mesh.mesh, named("holder"))
        served: list[str] = []

        async def ask(name: str, priority: Priority) -> None:
            calls = dict.fromkeys(BackendKind, named(name))
            answer = await mesh.mesh.send(Demand(model="m", priority=priority), calls, timeout_s=30.0)
            served.append(name)
            await answer.read()

        async with asyncio.TaskGroup() as tasks:
            for number, (name, priority) in enumerate(
                [("batch", Priority.BATCH), ("normal", Priority.NORMAL), ("interactive", Priority.INTERACTIVE)]
            ):
                tasks.create_task(ask(name, priority))
                await wait_until(lambda: mesh.mesh.snapshot().gateway.queued == number + 1, f"{name} waits")  # noqa: B023
            await holder.aclose()
        assert served == ["interactive", "normal", "batch"]


@pytest.mark.slow
# By their weights the second node is 100 times slower than the first: requests rather wait for the first, where
# ``adaptive`` decides, and more of them find the queue full.
@pytest.mark.parametrize(("policy", "least_served"), [(PolicyKind.LEAST_LOADED, 30), (PolicyKind.ADAPTIVE, 15)])
@pytest.mark.parametrize("seed", range(3))
async def test_under_random_faults_each_request_ends_once_and_no_slot_is_lost(
    seed: int, policy: PolicyKind, least_served: int
) -> None:
    """Faults come and go, clients leave at any moment: each request ends once, each place is given back once."""
    rng = Random(seed)
    kinds = [
        Faults(),
        Faults(cut_after_tokens=3),
        Faults(end_after_tokens=5),
        Faults(error_line_after_tokens=2),
        Faults(status=500, paths=tuple(BODIES)),
        Faults(disconnect=True, paths=tuple(BODIES)),
        Faults(status=429, paths=tuple(BODIES), times=3),
    ]
    ends: Counter[str] = Counter()
    async with mesh_of_hosts(
        host("a"), host("b", continues=False), host("c"), max_parallel=3, max_queue=20, timeout_s=20.0, policy=policy
    ) as mesh:
        want: dict[str, str] = {}

        async def send_request(path: str) -> None:
            try:
                answer = await send(mesh.mesh, make_call(path), resume=rng.random() < 0.8)
                try:
                    data = await answer.read()
                finally:
                    await answer.aclose()
            except GPUMeshError as error:
                ends[type(error).__name__] += 1
                return
            if answer.status == 200 and all("error" not in frame for frame in frames(data)):
                ends["served"] += 1
                # Models "a" and "c" close no turns, "b" does, and all say the same.
                assert text_of(data) == want[path]
            else:
                ends["failed"] += 1

        for path in BODIES:
            want[path] = text_of(await (await send(mesh.mesh, make_call(path))).read())
        tasks: set[asyncio.Task[None]] = set()
        for _ in range(150):
            tasks.add(asyncio.create_task(send_request(rng.choice(list(BODIES)))))
            await asyncio.sleep(rng.random() * 0.01)
            if rng.random() < 0.2:
                await mesh.hosts[rng.choice("abc")].set_faults(rng.choice(kinds))
            if rng.random() < 0.3:
                rng.choice(list(tasks)).cancel()
        for simulated in mesh.hosts.values():
            await simulated.set_faults(Faults())
        results = await asyncio.gather(*tasks, return_exceptions=True)
        wrong = [result for result in results if isinstance(result, BaseException)]
        assert all(isinstance(result, asyncio.CancelledError) for result in wrong), wrong
        await wait_until(mesh.wait_settled, "every place is given back")
        counters = mesh.mesh.request_counters
        assert counters.cancelled <= len(wrong)
        assert counters.accepted >= counters.cancelled + ends.total()
        assert ends["served"] > least_served
        assert mesh.mesh.snapshot().gateway.queued == 0
        assert sum(count for name in mesh.hosts for count in mesh.attempts(name).values()) >= counters.served


async def test_a_request_cancelled_in_the_queue_is_counted_as_cancelled() -> None:
    async with mesh_of_hosts(host("a", slots=1, tokens_per_s=50.0), max_parallel=1) as mesh:
        holder = await send(mesh.mesh, make_call())
        waits = asyncio.create_task(send(mesh.mesh, make_call()))
        await wait_until(lambda: mesh.mesh.snapshot().gateway.queued == 1, "it waits")
        waits.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waits
        await holder.aclose()
        counters = mesh.mesh.request_counters
        assert (counters.accepted, counters.cancelled, counters.in_flight) == (2, 2, 0)
        assert mesh.attempts("a") == {Outcome.CLIENT_GONE: 1}


# -- a server that hangs ---------------------------------------------------------------------------------------------


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "BACKEND_INTERVAL_S", 0.1)
    monkeypatch.setattr(prober, "BACKEND_TIMEOUT_S", 0.3)


@pytest.mark.usefixtures("quick_probes")
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_to_a_server_that_hangs_is_served_by_another_node(stream: bool) -> None:
    """It closes no connection, and its tunnel lives: that it answers no probe is what tells."""

    async def ask() -> Answer:
        answer = await send(mesh.mesh, make_call(stream=stream))
        await answer.read()
        return answer

    async with mesh_of_hosts(host("a"), host("b"), max_parallel=1) as mesh:
        await mesh.hosts["a"].set_faults(Faults(hang=True))
        async with asyncio.timeout(20):
            answers = await asyncio.gather(ask(), ask())
        assert [answer.node for answer in answers] == ["b", "b"]
        assert sorted(answer.attempts for answer in answers) == [1, 2]
        assert mesh.mesh.request_counters.served == 2


@pytest.mark.usefixtures("quick_probes")
async def test_a_request_to_the_only_server_goes_on_waiting_while_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may only be slow; and nobody else would be faster."""
    async with mesh_of_hosts(host("a")) as mesh:
        await mesh.hosts["a"].set_faults(Faults(hang=True))
        waiting = asyncio.create_task(send(mesh.mesh, make_call(stream=False)))
        await wait_until(lambda: mesh.mesh.snapshot().nodes[0].health is Health.DOWN, "it is known to hang")
        monkeypatch.setattr(prober, "BACKEND_TIMEOUT_S", 5.0)
        assert not waiting.done()
        await mesh.hosts["a"].set_faults(Faults())
        async with asyncio.timeout(20):
            assert (await waiting).status == 200
