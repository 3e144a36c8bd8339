"""A server at ``redis.url`` that is no Redis, or a broken one: the gateway goes on alone, and a finding says so."""

from __future__ import annotations

import asyncio

import pytest

from gpumesh.coordination.redis_coordination import RedisCoordination

OK_FIRST = 3  # until it has subscribed, so that what follows is a message
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
    b"*3\r\n$7\r\nmessage\r\n$15\r\ngpumesh:loads:1\r\n:5\r\n",
)


@pytest.mark.parametrize("good_answers", [0, OK_FIRST])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_wrong_answers_do_not_end_the_gateway(answer: bytes, good_answers: int) -> None:
    """An unexpected answer must not end the mesh."""
    problem_set = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        questions = 0
        while await reader.read(4096):
            questions += 1
            writer.write(b"+OK\r\n" if questions <= good_answers else answer)
        writer.close()

    def changed() -> None:
        if loads.problem is not None:
            problem_set.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    loads = RedisCoordination(f"redis://127.0.0.1:{port}/0", password=lambda: None, on_change=changed)
    running = asyncio.create_task(loads.run())
    problem = asyncio.create_task(problem_set.wait())
    try:
        await asyncio.wait((running, problem), timeout=5.0, return_when=asyncio.FIRST_COMPLETED)
        assert not running.done()
        assert loads.other_gateways_load("GPU-1") == 0
    finally:
        for task in (running, problem):
            task.cancel()
        await asyncio.gather(running, problem, return_exceptions=True)
        server.close()
