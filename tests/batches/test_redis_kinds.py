"""The kinds of Redis in which batches may be: over TLS with a user of few rights, a Redis Cluster, behind Sentinel."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from gpumesh.batches.redis.script import describe_url
from gpumesh.batches.redis.store import RedisBatchStore
from gpumesh.batches.values import BatchStatus
from gpumesh.errors import BatchStoreError
from tests.batches.stores import LONG_S, answers, start_batch
from tests.prerequisites import needs
from tests.redis_server import failover_lines, free_port, redis_cluster, redis_sentinel, redis_server
from tests.tunnels.polling import wait_until

# As in docs/how-to/several-gateways.md.
RIGHTS = "resetkeys ~gpumesh:1:{mesh}:* resetchannels &gpumesh:1:{mesh}:* +@all -@admin -@dangerous +info"


def open_store(url: str, password: str | None = None, ca_file: str | None = None) -> RedisBatchStore:
    return RedisBatchStore(url, "mesh", password=lambda: password, ca_file=ca_file)


async def work_on_a_batch(store: RedisBatchStore) -> None:
    """All that a batch needs, from its file to the results of its second try."""
    batch = await start_batch(store, 3)
    claims = await store.claim("w", 2, lease_s=LONG_S)
    assert await store.renew("w", claims, lease_s=LONG_S) == set()
    await store.record("w", answers(claims, failed=True))
    await store.record("w", answers(await store.claim("w", 1, lease_s=LONG_S)))
    await store.retry(batch.id)
    await store.record("w", answers(await store.claim("w", 9, lease_s=LONG_S)))
    await store.settle()
    await store.wait_for_change(0.01)
    assert (await store.get_batch(batch.id)).status is BatchStatus.COMPLETED
    assert [result.line for result in await store.read_results_by_line(batch.id)] == [1, 2, 3]
    assert await store.count_recent_results(batch.id, 60.0) == 5
    await store.delete_batch(batch.id)
    await store.delete_file(batch.new.input_file_id)
    assert not await store.list_batches()
    assert not await store.list_files()


@pytest.mark.parametrize(
    ("url", "description"),
    [
        ("redis://ann@host:7000/3", "Redis at host:7000"),
        ("unix:///run/redis.sock", "Redis at /run/redis.sock"),
        ("redis+sentinel://ann@one:1,[::1]:2/main/4", "Redis at one:1,[::1]:2"),
    ],
)
def test_a_redis_is_named_without_its_user(url: str, description: str) -> None:
    assert describe_url(url) == description


@pytest.mark.real
@needs("redis-server", "openssl")
async def test_over_tls_with_a_user_of_few_rights(tmp_path: Path) -> None:
    key_file, ca_file, port = tmp_path / "key.pem", str(tmp_path / "cert.pem"), free_port()
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key_file), "-out", ca_file, "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    options = ["--tls-port", str(port), "--tls-cert-file", ca_file, "--tls-key-file", str(key_file)]
    users = tmp_path / "users.acl"
    users.write_text(f"user ann on >open-sesame {RIGHTS}\nuser default off\n")
    async with redis_server(tmp_path, *options, "--tls-auth-clients", "no", "--aclfile", str(users)):
        url = f"rediss://ann@localhost:{port}/0"
        async with open_store(url, "open-sesame", ca_file) as store:
            await work_on_a_batch(store)
        async with open_store(url, "open-sesame") as store:
            with pytest.raises(BatchStoreError, match="certificate"):
                await store.list_files()


@pytest.mark.real
@needs("redis-server")
async def test_a_redis_cluster(tmp_path: Path) -> None:
    """The store is told of a server that does not have its keys."""
    async with redis_cluster(tmp_path) as (first, second), open_store(f"redis://127.0.0.1:{first.port}/0") as store:
        await work_on_a_batch(store)
        client = second.client()
        assert len(client.keys()) > 0
        client.close()


@pytest.mark.slow
@pytest.mark.real
@needs("redis-server")
async def test_a_batch_goes_on_after_a_failover(tmp_path: Path) -> None:
    ports = free_port(), free_port(), free_port()
    replica_of = ("--replicaof", f"127.0.0.1 {ports[0]}")
    async with (
        redis_server(tmp_path / "one", port=ports[0]) as first,
        redis_server(tmp_path / "two", *replica_of, port=ports[1]) as second,
        open_store(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{ports[2]}/main/0") as store,
    ):
        with closing(second.client()) as replica:
            await wait_until(
                lambda: replica.info("replication").get("master_link_status") == "up", "the replica is there"
            )
            async with redis_sentinel(tmp_path, ports[2], *failover_lines(ports[0])):
                await asyncio.sleep(1.5)  # until the sentinel knows the replica
                batch = await start_batch(store, 3)
                claims = await store.claim("w", 2, lease_s=LONG_S)
                await store.record("w", answers(claims[:1]))
                master = first.client()
                assert master.wait(1, 5000) == 1, "the replica has it all"
                master.close()
                first.stop()
                with pytest.raises(BatchStoreError):
                    await store.get_batch(batch.id)
                await wait_until(lambda: replica.info("replication")["role"] == "master", "it is the master")
                async with asyncio.timeout(30.0):
                    while True:
                        try:
                            assert await store.record("w", answers(claims)) == 1
                            break
                        except BatchStoreError:
                            await asyncio.sleep(0.05)
                await store.record("w", answers(await store.claim("w", 9, lease_s=LONG_S)))
                assert (await store.get_batch(batch.id)).status is BatchStatus.COMPLETED
