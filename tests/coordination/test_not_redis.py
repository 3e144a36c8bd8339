"""A server at ``redis.url`` that is no Redis, or a broken one: the gateway goes on alone, and a finding says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from tests.coordination.redis_server import KEY, SHORT, RedisServer, gateway, redis_server, request
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until


def bulk(value: object) -> bytes:
    """A value as the script returns it."""
    data = msgspec.msgpack.encode(value)
    return b"$%d\r\n%b\r\n" % (len(data), data)


SUBSCRIBED = 7  # so many commands come before the first step: of two connections, and the script
ANSWERS = (
    b":abc\r\n",
    b"$abc\r\n",
    b"$-5\r\n",
    b"*1\r\n" * 3000,
    b":" + b"1" * 5000 + b"\r\n",
    b"*1\r\n$7\r\nmessage\r\n",
    b":1\r\n",
    b"#t\r\n",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"\xff\xfe\r\n",
    b"*3\r\n$7\r\nmessage\r\n$3\r\nall\r\n:5\r\n",
    b"$-1\r\n",
    b"$3\r\n\xc1\xc1\xc1\r\n",
    bulk({"is_known": "yes"}),
    bulk({"is_known": False}),
    bulk({"is_known": True, "keys": [[0, 0, False, [], []]]}),
    bulk({"is_known": True, "mail": [[1, "grant", "GPU-1", 0, -1]]}),
    bulk({"is_known": True, "facts": [["gateway"]]}),
    b"-MOVED 1 :1\r\n",
    b"-MOVED nowhere\r\n",
)


@asynccontextmanager
async def false_redis(answer: bytes, good_answers: int) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal good_answers
        while data := await reader.read(65536):
            for _ in range(max(data.count(b"\r\nSUBSCRIBE") + data.count(b"SETINFO") + data.count(b"\r\nSCRIPT"), 1)):
                good_answers -= 1
                writer.write(b"+OK\r\n" if good_answers >= 0 else answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize("good_answers", [0, SUBSCRIBED])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_wrong_answers_do_not_end_the_gateway(answer: bytes, good_answers: int) -> None:
    async with false_redis(answer, good_answers) as url, gateway(url, joins=False) as running:
        takes = [asyncio.create_task(running.take()) for _ in range(3)]
        await wait_until(lambda: running.problem != "", "there is a problem")
        assert await asyncio.gather(*takes) == [True] * 3
        assert running.places.others_in_flight(KEY, 3, 4) == 0
        assert running.places.take_now(KEY), "it goes on alone"


@pytest.fixture
async def redis(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RedisServer]:
    async with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.mark.real
@needs("redis-server")
@pytest.mark.parametrize(
    ("channel", "message"),
    [
        ("all", b"\xc1"),
        ("all", msgspec.msgpack.encode(["other", "topic", 5])),
        ("to", msgspec.msgpack.encode([1, [1, "rob", KEY, 0, 0]])),
        ("to", msgspec.msgpack.encode([7, [1, "grant", KEY, 0, 0]])),
        ("to", msgspec.msgpack.encode([1, [9, "grant", KEY, 0, 0]])),
    ],
)
async def test_absurd_mail_gives_nobody_a_place(redis: RedisServer, channel: str, message: bytes) -> None:
    async with gateway(redis.url) as one, gateway(redis.url) as two:
        assert await one.take()
        two.wait(request())
        await wait_until(lambda: one.places.shared_keys() == [KEY], "it is shared")
        address = "all" if channel == "all" else f"to:{two.places.exchange.gateway}"
        redis.client().publish("gpumesh:1:{mesh}:" + address, message)
        await asyncio.sleep(SHORT.heartbeat_s)
        await wait_until(lambda: two.is_joined and one.is_joined, "it shares, or shares again")
        one.release()
        await wait_until(lambda: two.held == 1, "it gets the place")


@pytest.mark.real
@needs("redis-server")
async def test_what_another_program_writes_under_our_keys_is_a_problem_until_it_is_gone(redis: RedisServer) -> None:
    async with gateway(redis.url) as one:
        assert await one.take()
        redis.client().set("gpumesh:1:{mesh}:node:" + KEY, "{nonsense")
        await wait_until(lambda: one.problem != "", "it goes on alone")
        assert await one.take()
        redis.client().delete("gpumesh:1:{mesh}:node:" + KEY)
        await wait_until(lambda: one.is_joined and not one.problem, "it shares again")


@pytest.mark.real
@needs("redis-server")
@pytest.mark.parametrize("shift_s", [-3600.0, 3600.0])
async def test_the_clock_of_redis_is_set(redis: RedisServer, shift_s: float) -> None:
    """What is stored then looks as if it were of the past or of the future."""
    gateways = "gpumesh:1:{mesh}:gateways"
    client = redis.client(decode_responses=True)
    async with gateway(redis.url) as one, gateway(redis.url) as two:
        assert await one.take()
        assert not await two.take()
        for name, value in list(client.hgetall(gateways).items()):
            session, _, at = str(value).partition(" ")
            client.hset(gateways, str(name), f"{session} {float(at) - shift_s:.3f}")
        client.hset(gateways, "dead", f"1 {float(at) - shift_s:.3f}")
        await wait_until(lambda: client.hlen(gateways) == 2, "the dead gateway is removed, the others live")
        await wait_until(lambda: one.is_joined and two.is_joined, "they share")
        await asyncio.sleep(SHORT.heartbeat_s * 3)
        assert not await two.take()
        assert one.problem == two.problem == ""
