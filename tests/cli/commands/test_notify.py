from __future__ import annotations

import json
from pathlib import Path

from tests.mesh.servers import answer_with, serve
from tests.real.command import Gpumesh

NODES = "nodes: [{name: a, backend: {url: 'http://127.0.0.1:1'}}]\n"


async def test_a_test_message_by_each_rule(gpumesh: Gpumesh, tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text(NODES)
    ended = await gpumesh("-c", str(file), "notify", "test", code=2)
    assert "mesh.yaml has no section `notify`" in ended.err
    async with serve(answer_with(b"HTTP/1.1 204 No Content\r\n\r\n")) as server:
        file.write_text(f"{NODES}notify: [{{webhook: '{server.url}/s3cret'}}, {{command: 'false'}}]\n")
        ended = await gpumesh("-c", str(file), "notify", "test", code=1)
        assert ended.out == "webhook (json): sent\ncommand false: false ended with 1\n"
        (request,) = server.requests
    assert "a test: messages of this mesh arrive here" in json.loads(request.body)["text"]
