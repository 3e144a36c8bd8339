"""What a reload does to a running mesh, and that a reload at a bad moment does no harm."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gpumesh.daemon.control_socket.remote_session import RemoteSession
from gpumesh.daemon.up_options import UpOptions
from gpumesh.errors import ConfigError, GPUMeshError, MeshNotRunning, UsageError
from gpumesh.state import Health
from tests.daemon.reload.running import CHECK_INTERVAL_S, MODEL, ReloadedMesh, running_mesh, streaming_host
from tests.tunnels.polling import wait_until

ALPHA, BETA = streaming_host("alpha", ssh=False), streaming_host("beta", ssh=False)
BEHIND_SSH = streaming_host("gamma")


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[ReloadedMesh]:
    """A mesh of alpha and beta, which reads its file on request."""
    async with running_mesh(tmp_path, ALPHA, BETA) as made:
        yield made


@asynccontextmanager
async def stream_on(running: ReloadedMesh, node: str) -> AsyncIterator[asyncio.Task[list[bytes]]]:
    """A stream that has begun on this node; the task returns its frames."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}]}
    headers = {"X-GPUMesh-Node": node}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{running.url}/api/chat", json=body, headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        first = await response.content.readline()

        async def read() -> list[bytes]:
            return [first, *[line async for line in response.content]]

        task = asyncio.create_task(read())
        try:
            yield task
        finally:
            task.cancel()


async def status_of(running: ReloadedMesh, **request: Any) -> int:
    """The status of a short request."""
    body = {"model": MODEL, "prompt": "x", "stream": False, "options": {"num_predict": 1}, **request.pop("body", {})}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{running.url}/api/generate", json=body, **request) as response,
    ):
        await response.read()
        return response.status


# -- nodes -----------------------------------------------------------------------------------------------------------


async def test_a_removed_node_serves_what_it_has_and_then_ends(running: ReloadedMesh) -> None:
    async with stream_on(running, "beta") as stream:
        report = await running.reload(running.lab.node("alpha"))
        assert report.lines() == ["beta: removed; 1 request still runs over its old tunnel"]
        assert running.names == ["alpha"]
        assert await status_of(running, headers={"X-GPUMesh-Node": "beta"}) == 400, "there is no such node any more"
        assert "node-leaving" in running.findings()
        frames = await stream
        assert b'"done":true' in frames[-1]
    await wait_until(lambda: not running.mesh.fleet.leaving, "its tunnel is closed")
    assert "node-leaving" not in running.findings()
    assert running.lab.hosts["beta"].counters.in_flight == 0
    assert running.mesh.request_counters.served == 1


async def test_requests_that_take_too_long_move_to_other_nodes(
    running: ReloadedMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running.reload(running.lab.node("alpha"), running.lab.node("beta"), timeout="100ms")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}]}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{running.url}/api/chat", json=body, headers={"X-GPUMesh-Timeout": "20"}) as response,
    ):
        first = response.headers["X-GPUMesh-Node"]
        other = "beta" if first == "alpha" else "alpha"
        await response.content.readline()
        await running.reload(running.lab.node(other), timeout="100ms")
        lines = [line async for line in response.content]
    assert b'"done":true' in lines[-1]
    await wait_until(lambda: not running.mesh.fleet.leaving, "the removed node is closed")
    assert any("did not end within 0 s" in line for line in running.log())
    assert running.lab.hosts[first].counters.in_flight == 0


async def test_waiting_requests_find_the_nodes_of_the_new_file(running: ReloadedMesh) -> None:
    """One of them asks for a node that is gone: it is told so at once."""
    beta = running.lab.node("beta")
    await running.reload({**beta, "backend": {**beta["backend"], "max_parallel": 1}})
    async with stream_on(running, "beta") as stream:
        waiting = [asyncio.create_task(status_of(running)) for _ in range(3)]
        pinned = asyncio.create_task(status_of(running, headers={"X-GPUMesh-Node": "beta"}))
        await wait_until(lambda: running.mesh.snapshot().gateway.queued == 4, "they wait")
        await running.reload(running.lab.node("alpha"))
        assert await asyncio.gather(*waiting) == [200, 200, 200]
        assert await pinned == 503
        assert b'"done":true' in (await stream)[-1]


async def test_small_changes_keep_node_and_tunnel(running: ReloadedMesh) -> None:
    node = running.mesh.fleet["alpha"]
    backend = {**running.lab.node("alpha")["backend"], "max_parallel": 3}
    report = await running.reload(
        running.lab.node("alpha", weight=2, tier=2, labels={"site": "x"}, expect={"gpus": 1}, backend=backend),
        running.lab.node("beta"),
    )
    assert report.lines() == [
        "alpha: backend.max_parallel not set -> 3, expect.gpus not set -> 1, weight 1 -> 2, tier 1 -> 2, "
        "labels.site not set -> x"
    ]
    assert running.mesh.fleet["alpha"] is node
    account = node.account
    assert (account.weight, account.tier, account.max_parallel) == (2.0, 2, 3)
    state = running.mesh.snapshot().node("alpha")
    assert (state.labels, state.load.limit) == ((("site", "x"),), 3)


async def test_a_node_that_is_disabled_and_enabled(running: ReloadedMesh) -> None:
    alpha, beta = running.lab.node("alpha"), running.lab.node("beta")
    running.mesh.drain("alpha")
    report = await running.reload({**alpha, "enabled": False}, beta)
    assert report.lines() == ["alpha: enabled true -> false"]
    assert running.mesh.snapshot().node("alpha").reason == "disabled in mesh.yaml"
    report = await running.reload(alpha, beta)
    assert report.lines() == ["alpha: enabled false -> true"]
    await running.session.wait_first_report(10.0)
    assert running.mesh.snapshot().node("alpha").health is Health.DRAINING, "a person has drained it"


async def test_what_was_learned_of_a_server_outlives_its_name(running: ReloadedMesh) -> None:
    for _ in range(3):
        assert await status_of(running, headers={"X-GPUMesh-Node": "alpha"}, body={"options": {}}) == 200
    assert not running.mesh.fleet["alpha"].rates.is_empty
    report = await running.reload({**running.lab.node("alpha"), "name": "renamed"}, running.lab.node("beta"))
    assert report.lines() == ["renamed: added", "alpha: removed"]
    await running.session.wait_first_report(10.0)
    assert not running.mesh.fleet["renamed"].rates.is_empty


async def test_a_changed_ssh_section_gets_a_new_tunnel(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, BEHIND_SSH) as running:
        gamma = running.lab.node("gamma")
        port = running.mesh.snapshot().node("gamma").tunnel.local_port
        async with stream_on(running, "gamma") as stream:
            report = await running.reload({**gamma, "ssh": {**gamma["ssh"], "keepalive": "3s"}})
            assert report.lines() == [
                "gamma: ssh.keepalive 2s -> 3s; opened anew; 1 request still runs over its old tunnel"
            ]
            # It waits for the new tunnel, which is connecting.
            assert await status_of(running) == 200
            assert running.mesh.snapshot().node("gamma").tunnel.local_port != port
            assert b'"done":true' in (await stream)[-1]
        await wait_until(lambda: not running.mesh.fleet.leaving, "the old tunnel is closed")
        # The same node many times, while it connects: the last one stays.
        for seconds in range(4, 9):
            await running.reload({**gamma, "ssh": {**gamma["ssh"], "keepalive": f"{seconds}s"}})
        assert await status_of(running) == 200
        report = await running.reload(
            {**gamma, "ssh": {**gamma["ssh"], "keepalive": "8s"}}, more={"tunnels": {"share": True}}
        )
        await wait_until(lambda: not running.mesh.fleet.leaving, "all old tunnels are closed")
        assert await status_of(running) == 200


# -- models and the gateway ------------------------------------------------------------------------------------------


async def test_models_hold_for_the_next_request(running: ReloadedMesh) -> None:
    assert await status_of(running, body={"model": "other"}) == 404
    report = await running.reload(more={"models": {"m": {"aliases": ["other"], "nodes": ["beta"]}}})
    assert report.lines() == ["model m: added"]
    assert await status_of(running, body={"model": "other"}) == 200
    counts = {node.name: node.load.served for node in running.mesh.snapshot().nodes}
    assert counts == {"alpha": 0, "beta": 1}
    report = await running.reload(more={"models": {}})
    assert report.lines() == ["model m: removed"]
    assert await status_of(running, body={"model": "other"}) == 404


async def test_keys_hold_for_the_next_request(running: ReloadedMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await status_of(running) == 200
    with pytest.raises(GPUMeshError, match="GPUMESH_TEST_KEY"):  # it is not set where the mesh was started
        await running.reload(api_key_env="GPUMESH_TEST_KEY")
    assert await status_of(running) == 200, "nothing has changed"
    await asyncio.sleep(6 * CHECK_INTERVAL_S)  # looks at the file do not replace the finding
    assert running.findings()["config-invalid"].message.count("the variable GPUMESH_TEST_KEY is not set")
    monkeypatch.setenv("GPUMESH_TEST_KEY", "secret")
    await running.session.reload()
    assert "config-invalid" not in running.findings()
    assert await status_of(running) == 401
    assert await status_of(running, headers={"Authorization": "Bearer secret"}) == 200
    assert running.mesh.snapshot().gateway.access == "key"
    await running.reload(reload="manual")
    assert await status_of(running) == 200


async def test_bounds_and_the_access_log_hold_for_the_next_request(running: ReloadedMesh) -> None:
    report = await running.reload(max_queue=0, policy="round-robin", access_log=False, body_memory_mib=16, timeout="5s")
    assert report.lines() == [
        "gateway.policy adaptive -> round-robin",
        "gateway.max_queue 1024 -> 0",
        "gateway.timeout 10m -> 5s",
        "gateway.access_log true -> false",
        "gateway.body_memory_mib 512 -> 16",
    ]
    assert await status_of(running) == 200
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{running.url}/api/chat", data=io.BytesIO(b"x" * (15 << 20))) as answer,
    ):
        assert answer.status == 413
    await running.reload(reload="manual")
    assert await status_of(running) == 200
    await wait_until(running.paths.access_log.exists, "the log is written again")
    assert len(running.paths.access_log.read_text().splitlines()) == 1


async def test_what_needs_a_restart_is_said_until_then(running: ReloadedMesh) -> None:
    report = await running.reload(listen="127.0.0.1:1")
    assert report.lines() == ["gateway.listen 127.0.0.1:0 -> 127.0.0.1:1: takes effect after a restart"]
    assert await status_of(running) == 200
    finding = running.findings()["config-changed"]
    assert "another gateway.listen" in finding.message
    assert "only after a restart" in (finding.hint or "")
    assert (await running.session.reload()).lines() == report.lines(), "and so it is said again"
    running.write(reload="manual")
    assert (await running.session.reload()).lines() == ["nothing has changed"]
    assert "config-changed" not in running.findings()


async def test_the_name_of_the_mesh(running: ReloadedMesh) -> None:
    text = running.paths.config.read_text()
    running.paths.config.write_text(text.replace('"name": "tested"', '"name": "another"'))
    report = await running.session.reload()
    assert report.lines() == ["name tested -> another"]
    assert running.mesh.snapshot().mesh == "another"


# -- bad files and bad moments ---------------------------------------------------------------------------------------


async def test_a_bad_file_changes_nothing_and_is_said(running: ReloadedMesh) -> None:
    text = running.paths.config.read_text()
    before = running.mesh.topology
    for content in (text.replace('"nodes"', '"nodess"'), "nodes: []\n", "nodes: [", ""):
        running.paths.config.write_text(content)
        with pytest.raises(ConfigError) as caught:
            await running.session.reload()
        assert caught.value.problems[0].line is not None or content == ""
        message = running.findings()["config-invalid"].message
        assert str(caught.value.problems[0]) in message
    running.paths.config.unlink()
    with pytest.raises(ConfigError):
        await running.session.reload()
    running.paths.config.mkdir()
    with pytest.raises(ConfigError):
        await running.session.reload()
    running.paths.config.rmdir()
    assert running.mesh.topology is before
    running.paths.config.write_text(text)
    assert not (await running.session.reload()).applied
    assert "config-invalid" not in running.findings()


async def test_reloads_at_once_run_one_after_the_other(running: ReloadedMesh) -> None:
    running.write(running.lab.node("alpha"))
    reports = await asyncio.gather(*(running.session.reload() for _ in range(5)))
    assert sorted(len(report.applied.removed) for report in reports) == [0, 0, 0, 0, 1]


async def test_a_client_that_leaves_during_a_reload(running: ReloadedMesh) -> None:
    """Ctrl-C of `gpumesh reload`: all or nothing, and the next reload works."""
    running.write(running.lab.node("alpha"))
    remote = RemoteSession(running.paths.socket)
    for turns in range(0, 40, 4):
        task = asyncio.create_task(remote.reload())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert running.names in (["alpha"], ["alpha", "beta"])
    await remote.reload()
    assert running.names == ["alpha"]


async def test_a_mesh_that_ends_takes_nothing_over(running: ReloadedMesh) -> None:
    running.write(running.lab.node("alpha"))
    assert running.session.file is not None
    running.session.file.stop()  # type: ignore[attr-defined]  # as ``run_mesh`` does before it drains
    with pytest.raises(MeshNotRunning):
        await running.session.reload()
    assert running.names == ["alpha", "beta"]


async def test_a_tunnel_that_cannot_be_made_changes_nothing(
    running: ReloadedMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(24, "Too many open files")

    made = running.mesh.factory.make_tunnel
    monkeypatch.setattr(type(running.mesh.factory), "make_tunnel", fail)
    gamma = {"name": "gamma", "backend": {"url": "http://127.0.0.1:1"}}
    with pytest.raises(GPUMeshError, match="Too many open files"):
        await running.reload(running.lab.node("alpha", weight=5), gamma)
    assert running.names == ["alpha", "beta"]
    assert running.mesh.fleet["alpha"].account.weight == 1.0
    monkeypatch.setattr(type(running.mesh.factory), "make_tunnel", lambda _, *arguments: made(*arguments))
    await running.session.reload()
    assert running.names == ["alpha", "gamma"]


async def test_a_mesh_of_chosen_nodes_stays_with_them(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, ALPHA, BETA, options=UpOptions(("beta",))) as running:
        assert running.names == ["beta"]
        alpha, beta = running.lab.node("alpha", weight=2), running.lab.node("beta", weight=3)
        report = await running.reload(alpha, beta)
        assert report.lines() == [
            "beta: weight 1 -> 3",
            "alpha: left alone, because `gpumesh up` named other nodes",
        ]
        assert running.names == ["beta"]
        assert "config-changed" not in running.findings()
        with pytest.raises(UsageError, match="none of the nodes"):
            await running.reload(alpha)
        assert running.names == ["beta"]


async def test_the_mesh_ends_while_a_removed_node_still_serves(tmp_path: Path) -> None:
    async with (
        asyncio.timeout(20),
        running_mesh(tmp_path, ALPHA, BETA) as running,
        stream_on(running, "beta"),
    ):
        await running.reload(running.lab.node("alpha"))
        assert len(running.mesh.fleet.leaving) == 1


# -- the file is followed --------------------------------------------------------------------------------------------


async def test_a_saved_file_is_taken_over(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, ALPHA, BETA, reload="auto") as running:
        running.write(running.lab.node("alpha"))
        await wait_until(lambda: running.names == ["alpha"], "the mesh has followed its file")
        report = await running.session.reload()
        assert report.applied.removed == ("beta",), "it is told what the mesh did by itself"
        assert report.age_s > 0
        assert not (await running.session.reload()).applied, "once"
        spare = running.paths.config.with_suffix(".new")
        running.write(running.lab.node("alpha"), running.lab.node("beta"))
        running.paths.config.rename(spare)
        spare.rename(running.paths.config)  # as editors save
        await wait_until(lambda: running.names == ["alpha", "beta"], "the mesh has followed its file")
        running.paths.config.write_text("nodes: [")
        await wait_until(lambda: "config-invalid" in running.findings(), "it is said")
        running.write(running.lab.node("beta"), reload="manual")
        await wait_until(lambda: running.names == ["beta"], "the mesh has followed its file")
        assert "config-invalid" not in running.findings()
        running.write(running.lab.node("alpha"))
        await wait_until(lambda: "config-changed" in running.findings(), "it is said, and not done")
        assert running.names == ["beta"]


async def test_a_file_that_others_can_write_is_not_taken_over_by_itself(tmp_path: Path) -> None:
    """It can run any program. A person may want it nevertheless."""
    async with running_mesh(tmp_path, ALPHA, BETA, reload="auto") as running:
        running.paths.config.chmod(0o666)
        running.write(running.lab.node("alpha"))
        await wait_until(lambda: "config-invalid" in running.findings(), "it is said")
        assert "may be written to by every user" in running.findings()["config-invalid"].message
        assert running.names == ["alpha", "beta"]
        await running.session.reload()
        assert running.names == ["alpha"]
