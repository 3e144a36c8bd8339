"""What `gpumesh doctor` finds out about a Redis: a real one, with and without what gateways need."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from gpumesh.coordination.redis_check import _find_problems, check_redis
from gpumesh.errors import GPUMeshError
from gpumesh.topology import RedisSpec
from tests.coordination.redis_server import free_port, gateway, redis_server
from tests.prerequisites import needs
from tests.redis_server import redis_sentinel
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, needs("redis-server")]


async def test_a_redis_that_will_do(tmp_path: Path) -> None:
    async with redis_server(tmp_path, "--appendonly", "yes") as server, gateway(server.url, mesh="home") as other:
        report = await check_redis(RedisSpec(server.url), "home")
        assert report.server.startswith(("Redis ", "Valkey "))
        assert (report.gateways, report.problems) == (1, ())
        assert report.answer_ms > 0.0
        assert (await check_redis(RedisSpec(server.url), "garage")).gateways == 0
        assert other.is_joined
        assert server.client().hlen("gpumesh:1:{home}:gateways") == 1, "nothing is left of the trial"


async def test_what_is_not_allowed_or_not_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORD", "open-sesame")
    options = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    async with redis_server(tmp_path, *options) as server:
        client = server.client()
        client.acl_setuser("reader", enabled=True, passwords=["+open-sesame"], keys="*", commands=["+@read", "+ping"])
        report = await check_redis(RedisSpec(server.url), "home")
        assert [problem.split(":")[0] for problem in report.problems] == [
            "its maxmemory-policy is allkeys-lru",
            "its appendonly is off",
        ]
        spec = RedisSpec(server.url.replace("unix://", "unix://reader@"), "WORD")
        report = await check_redis(spec, "home")
        assert report.problems[0].startswith("it refuses what sharing needs: ")
        assert report.server == "Redis of an unknown version"
        with pytest.raises(GPUMeshError):
            await check_redis(RedisSpec(spec.url, None), "home")
        client.replicaof("127.0.0.1", "1")
        report = await check_redis(RedisSpec(server.url), "home")
        assert "it is a replica, which may only be read" in report.problems
        assert "it refuses what sharing needs: " in report.problems[0]


async def test_the_user_of_the_documentation_may_do_all_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "several-gateways.md").read_text()
    [line] = [line for line in page.splitlines() if line.startswith("ACL SETUSER")]
    monkeypatch.setenv("WORD", "PASSWORD")
    async with redis_server(tmp_path, "--appendonly", "yes") as server:
        server.client().execute_command(*line.split())  # type: ignore[no-untyped-call]
        spec = RedisSpec(server.url.replace("unix://", "unix://gateway@"), "WORD")
        report = await check_redis(spec, "home")
        assert report.problems == ()
        assert report.server != "Redis of an unknown version"
        assert (await check_redis(spec, "garage")).problems != (), "another mesh"
        async with gateway(spec.url, password=lambda: "PASSWORD", mesh="home") as one:
            assert one.is_joined


async def test_sentinels_may_have_a_password_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTINEL_WORD", "open-sesame")
    ports = free_port(), free_port()
    lines = ("requirepass open-sesame", f"sentinel monitor main 127.0.0.1 {ports[0]} 1")
    url = f"redis+sentinel://127.0.0.1:{ports[1]}/main/0"
    async with (
        redis_server(tmp_path / "one", "--appendonly", "yes", port=ports[0]),
        redis_sentinel(tmp_path, ports[1], *lines),
    ):
        await wait_until(lambda: _listens(ports[1]), "the sentinel listens")
        report = await check_redis(RedisSpec(url, sentinel_password_env="SENTINEL_WORD"), "home")
        assert report.problems == ()
        with pytest.raises(GPUMeshError, match=r"(?i)auth"):
            await check_redis(RedisSpec(url), "home")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("facts", "answer_ms", "expected"),
    [
        ({}, 1.0, []),
        ({"redis_version": "6.0.16"}, 1.0, ["older"]),
        ({"redis_version": "7.2.4", "aof_enabled": "1", "role": "master"}, 1.0, []),
        ({"redis_version": "\x1b", "used_memory": "²", "maxmemory": "-1"}, 1.0, []),
        ({"used_memory": "95", "maxmemory": "100"}, 1.0, ["95%"]),
        ({"maxmemory": "0", "maxmemory_policy": "allkeys-lru"}, 1.0, []),
        ({}, 50.0, ["50 ms"]),
        ({}, 500.0, ["go on alone"]),
    ],
)
def test_what_the_facts_mean(facts: dict[str, str], answer_ms: float, expected: list[str]) -> None:
    problems = list(_find_problems(facts, answer_ms))
    assert len(problems) == len(expected)
    assert all(part in problem for part, problem in zip(expected, problems, strict=True))
