"""A server that looks like Ollama, reads bodies of any size without keeping them, and streams a token every 10 ms.

Run as a program, so that what it does takes no time of the test's own loop: ``python sink.py MODEL`` prints its port.
"""

from __future__ import annotations

import asyncio
import json
import sys

TOKENS_S = 0.01
STREAM_S = 60.0


async def serve(model: str) -> None:
    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        _, named, rest = head.partition(b"content-length: ")
        left = int(rest.split(b"\r\n")[0]) if named else 0
        start = b""
        while left:
            piece = await reader.read(min(left, 1 << 20))
            if not piece:
                raise ConnectionResetError
            start = start or piece
            left -= len(piece)
        if b"/api/chat" in head and b'"stream":true' in start[:200]:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n")
            until = asyncio.get_running_loop().time() + STREAM_S
            while asyncio.get_running_loop().time() < until:
                token = b'{"message":{"role":"assistant","content":"token "},"done":false}\n'
                writer.write(b"%x\r\n%b\r\n" % (len(token), token))
                await writer.drain()
                await asyncio.sleep(TOKENS_S)
            return False
        reply: dict[str, object] = {"version": "0.12.6", "models": [{"name": model, "model": model}]}
        if b"/api/chat" in head:
            reply = {"model": model, "message": {"role": "assistant", "content": "hi"}, "done": True}
        body = json.dumps(reply).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        await writer.drain()
        return True

    server = await asyncio.start_server(on_client, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
