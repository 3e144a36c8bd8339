"""npm's `ollama`, unmodified, on Node.js."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.gateway.fleet import MODEL, serve_hosts
from tests.prerequisites import REASON, needs, program
from tests.real.test_clients import run

PACKAGE = "ollama@0.6.4"
SCRIPT = Path(__file__).with_name("ollama_client.mjs")


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our script in a folder where the package is installed."""
    npm = program("npm")
    assert npm is not None
    folder = tmp_path_factory.mktemp("npm")
    command = [npm, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    if done.returncode:
        pytest.skip(f"{REASON}npm's registry: {done.stderr.strip()[-200:]}")
    return Path(shutil.copy(SCRIPT, folder))


@pytest.mark.slow
@pytest.mark.real
@needs("node")
async def test_npm_ollama(script: Path) -> None:
    node = program("node")
    assert node is not None
    async with serve_hosts() as fleet:
        out = await run(node, script, fleet.gateway.url, MODEL, "nomic-embed-text", env={})
        seen = json.loads(out)
        assert seen["chat"]["message"]["content"]
        assert "".join(part["message"]["content"] for part in seen["streamed"]) == seen["chat"]["message"]["content"]
        assert seen["streamed"][-1]["done"] is True
        assert (seen["generated"]["done_reason"], seen["generated"]["eval_count"]) == ("length", 3)
        assert seen["called"]["message"]["tool_calls"][0]["function"]["name"] == "weather"
        assert set(json.loads(seen["formatted"]["message"]["content"])) == {"city"}
        assert seen["embedded"] == 2
        assert {MODEL, "llama3.1:8b"} <= set(seen["listed"])
        assert seen["shown"] == "qwen2"
        assert MODEL in seen["running"]
        assert seen["pulled"][-1] == {"status": "success"}
        assert seen["deleted"] == {"status": "success"}
        assert not any("new:1b" in host.engine.store for host in fleet.hosts.values())
        assert seen["missing"]["status"] == 404
        assert "model 'nobody:1b' not found" in seen["missing"]["message"]
        assert seen["refused"]["status"] == 400
        assert "does not support thinking" in seen["refused"]["message"]
        assert seen["aborted"] is not None
