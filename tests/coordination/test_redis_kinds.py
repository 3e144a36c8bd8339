"""The kinds of Redis that ``redis.url`` may name: over TLS, with a user, behind Sentinel, a Redis Cluster, and none."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import ResponseError

from gpumesh.config.redis_url import parse_redis_url
from gpumesh.coordination.redis_urls import moved_address, read_address
from gpumesh.errors import UsageError
from tests.coordination.redis_server import free_port, gateway, redis_server, request
from tests.prerequisites import needs
from tests.redis_server import failover_lines, redis_cluster, redis_sentinel
from tests.tunnels.polling import wait_until

# What a user of Redis must be allowed to do: docs/how-to/several-gateways.md has the same list.
COMMANDS = (
    "ping subscribe evalsha script|load publish time get set del incr expire hset hdel hgetall hkeys "
    "zadd zcard zmscore zremrangebyrank"
)


def test_urls_are_read() -> None:
    plain = read_address("redis://ann@host:7000/3")
    assert plain.connection_class is Connection
    assert plain.options == {"host": "host", "port": 7000, "db": 3, "username": "ann"}
    tls = read_address("rediss://host", ca_file="/ca.pem")
    assert tls.connection_class is SSLConnection
    assert tls.options["ssl_ca_certs"] == "/ca.pem"
    assert read_address("unix:///run/redis.sock").connection_class is UnixDomainSocketConnection
    behind = read_address("rediss+sentinel://ann@one:1,[::1]:2,three/main/4", ca_file="/ca.pem")
    assert behind.sentinels == (("one", 1), ("::1", 2), ("three", 26379))
    assert (behind.service, behind.options["db"], behind.options["username"]) == ("main", 4, "ann")
    assert "username" not in behind.sentinel_address("one", 1).options
    assert behind.at("four", 5).options["host"] == "four"


@pytest.mark.parametrize(
    "url",
    ["redis+sentinel://one:1", "redis+sentinel:///main", "redis+sentinel://one:x/main", "redis+sentinel://one/m/x"],
)
def test_a_url_of_sentinels_that_cannot_be_read_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"redis\.url"):
        read_address(url)
    with pytest.raises(ValueError, match=r"is not|holds"):
        parse_redis_url(url)


def test_mesh_yaml_takes_the_urls_of_sentinels() -> None:
    for url in ("redis+sentinel://one:1,two:2/main/0", "rediss+sentinel://ann@one/main"):
        assert parse_redis_url(url) == url
    with pytest.raises(ValueError, match="password"):
        parse_redis_url("redis+sentinel://ann:word@one:1/main")


@pytest.mark.parametrize("text", ["MOVED 3999 10.0.0.2:6381", "3999 10.0.0.2:6381"])
def test_a_redis_cluster_says_where_the_keys_are(text: str) -> None:
    error = type("MovedError", (ResponseError,), {})(text)
    moved = moved_address(error, read_address("redis://one:1/0"))
    assert moved is not None
    assert (moved.options["host"], moved.options["port"]) == ("10.0.0.2", 6381)
    assert moved_address(ResponseError("ERR 3999 host:1"), read_address("redis://one:1/0")) is None


@pytest.mark.real
@needs("redis-server", "openssl")
async def test_over_tls_with_a_user(tmp_path: Path) -> None:
    key_file, ca_file, port = tmp_path / "key.pem", str(tmp_path / "cert.pem"), free_port()
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key_file), "-out", ca_file, "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    options = ["--tls-port", str(port), "--tls-cert-file", ca_file, "--tls-key-file", str(key_file)]
    commands = " ".join(f"+{command}" for command in COMMANDS.split())
    users = tmp_path / "users.acl"
    users.write_text(f"user ann on >open-sesame ~gpumesh:* &gpumesh:* -@all {commands}\nuser default off\n")
    async with redis_server(tmp_path, *options, "--tls-auth-clients", "no", "--aclfile", str(users)):
        url = f"rediss://ann@localhost:{port}/0"
        async with (
            gateway(url, password=lambda: "open-sesame", ca_file=ca_file) as one,
            gateway(url, password=lambda: "open-sesame", ca_file=ca_file) as two,
        ):
            assert await one.take()
            assert not await two.take()
            two.wait(request())
            await asyncio.sleep(0.05)
            one.release()
            await wait_until(lambda: two.held == 1, "mail comes too")
        async with gateway(url, password=lambda: "open-sesame", joins=False) as three:
            await wait_until(lambda: "certificate" in three.problem, "a certificate of nobody is refused")


@pytest.mark.real
@needs("redis-server")
async def test_sentinel_tells_the_new_master_after_a_failover(tmp_path: Path) -> None:
    ports = free_port(), free_port(), free_port()
    url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{ports[2]}/main/0"
    replica_of = ("--replicaof", f"127.0.0.1 {ports[0]}")
    async with (
        redis_server(tmp_path / "one", port=ports[0]) as first,
        redis_server(tmp_path / "two", *replica_of, port=ports[1]) as second,
    ):
        await wait_until(
            lambda: first.client().info("replication").get("connected_slaves") == 1, "the replica is there"
        )
        async with (
            redis_sentinel(tmp_path, ports[2], *failover_lines(ports[0])),
            gateway(url) as one,
            gateway(url) as two,
        ):
            assert await one.take()
            assert not await two.take()
            await asyncio.sleep(1.5)  # until the sentinel knows the replica
            first.stop()
            assert await two.take(), "it goes on alone"
            await wait_until(lambda: second.client().info("replication")["role"] == "master", "it is the master")
            await wait_until(lambda: one.is_joined and two.is_joined and not two.problem, "both are there")
            assert second.client().hlen("gpumesh:1:{mesh}:gateways") == 2


@pytest.mark.real
@needs("redis-server")
async def test_a_server_of_a_redis_cluster_sends_to_the_right_one(tmp_path: Path) -> None:
    async with redis_cluster(tmp_path) as (first, second):
        url = f"redis://127.0.0.1:{first.port}/0"
        async with gateway(url) as left, gateway(f"redis://127.0.0.1:{second.port}/0") as right:
            assert await left.take()
            assert not await right.take()
            assert left.problem == right.problem == ""
