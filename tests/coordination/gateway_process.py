"""A gateway as a process of its own, so that a test can stop and kill it: ``python -m ... URL``.

It takes the only place of the key whenever it can, and prints a line ``PLACE yes`` or ``PLACE no`` for each attempt. It
keeps the place until it reads a line.
"""

from __future__ import annotations

import asyncio
import sys

from tests.coordination.redis_server import gateway


async def main(url: str) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with gateway(url) as running:
        while True:
            is_taken = await running.take()
            print("PLACE", "yes" if is_taken else "no", running.problem, flush=True)
            if is_taken:
                if not await reader.readline():
                    return
                running.release()
            else:
                await asyncio.sleep(0.02)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
