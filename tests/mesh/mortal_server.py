"""An Ollama in a process of its own, which ends at a request: a real process dies, with all its connections."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.mesh.meshes import MODEL

SERVER = """
import http.server, json, os, sys
LISTED = json.dumps({"models": [{"name": sys.argv[1], "model": sys.argv[1]}]}).encode()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(b'{"version":"0.12.6"}' if self.path == "/api/version" else LISTED)
    def do_POST(self):
        if sys.argv[2].encode() in self.rfile.read(int(self.headers["Content-Length"])):
            os._exit(9)
        self.answer(b'{"message":{"content":"y"},"done":true}')
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@asynccontextmanager
async def mortal_server(deadly_text: str) -> AsyncIterator[tuple[int, asyncio.subprocess.Process]]:
    """A server that a request with ``deadly_text`` kills: its port and its process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVER, MODEL, deadly_text), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline()), process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
