"""Puts what `gpumesh bench run` says beside what the server knows, for many streams and each way of the requests.

The server is `fast_ollama.py` on this machine: 100 tokens/s for each stream, the first token after 60 ms. It logs when
each request came and when its tokens were sent. So the differences of TTFT, end-to-end and tokens/s are those of the
load generator (``--via url``, ``direct``), or of the load generator and the mesh together (``gateway``, ``mesh``). Each
line also has what bench itself says of it: CLIENT-BOUND, MESH-BOUND, MACHINE-BUSY or nothing.

Run it on a machine with nothing else to do, or with a high priority: ``chrt -f 20 python benchmarks/load_honesty.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GPUMESH = (sys.executable, "-m", "gpumesh")
FIRST_TOKEN_MS = 60
ROUNDS = 3  # requests for each stream
LINE = "{:8} {:>4} {:>9} {:>8} {:>8} {:>8} {:>7} {:>8} {:>9} {:>8} {:>9}  {}"


def read_truth(url: str) -> list[tuple[float, float, float, int]]:
    """When each stream since the last call was asked for, began and ended (seconds), and its tokens."""
    with urllib.request.urlopen(f"{url}/truth", timeout=10) as response:
        return [tuple(stream) for stream in json.load(response) if stream[3] > 1]


def measure(url: str, way: str, streams: int, tokens: int, folder: Path) -> dict[str, Any]:
    """The stage of a sweep with so many streams, as bench reports it."""
    target = ["--url", url, "--api", "ollama"] if way == "url" else ["--via", way]
    count = str(ROUNDS * streams)
    command = [*GPUMESH, "bench", "run", "--scenario", "sweep", "-m", "bench:1b", "-c", str(streams), "-n", count]
    command += ["--tokens", str(tokens), "--out", str(folder / "result"), "--force", "--json", "--quiet", *target]
    ended = subprocess.run(command, cwd=folder, check=True, capture_output=True)
    stages: list[dict[str, Any]] = json.loads(ended.stdout)["stages"]
    return stages[0]


def describe(way: str, streams: int, stage: dict[str, Any], truth: list[tuple[float, float, float, int]]) -> str:
    """The line of a stage: bench's medians and rate as differences from the truth, and the conditions."""
    ttft_ms = statistics.median((first - asked) * 1000 for asked, first, _, _ in truth)
    total_ms = statistics.median((last - asked) * 1000 for asked, _, last, _ in truth)
    seconds = max(last for _, _, last, _ in truth) - min(asked for asked, _, _, _ in truth)
    rate = sum(tokens for *_, tokens in truth) / seconds
    conditions = stage["conditions"]
    mesh = conditions["mesh"] or {}
    return LINE.format(
        way,
        streams,
        f"{stage['served']}/{stage['requests']}",
        f"{stage['latency']['ttft']['p50'] / ttft_ms - 1:+.1%}",
        f"{stage['latency']['end_to_end']['p50'] / total_ms - 1:+.1%}",
        f"{stage['rates']['output_tokens_per_s'] / rate - 1:+.1%}",
        f"{conditions['generator']['cpu']:.2f}",
        f"{conditions['us_per_piece']:.1f}",
        f"{mesh['cpu']:.2f}" if mesh else "-",
        f"{conditions['machine']['busy']:.0%}" if conditions["machine"] else "-",
        f"{conditions['burst_wait_ms']:.1f} ms" if conditions["burst_wait_ms"] is not None else "-",
        (conditions["limit"] or "").upper(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="2,16,64,128,256")
    parser.add_argument("--via", default="url,direct,gateway,mesh")
    parser.add_argument("--tokens", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o700)
        os.environ.update(XDG_RUNTIME_DIR=name, XDG_STATE_HOME=name)
        command = [sys.executable, str(HERE / "fast_ollama.py"), "--first-token", str(FIRST_TOKEN_MS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            node = f"{{name: local, backend: {{kind: ollama, url: {url}, max_parallel: 512}}}}"
            (folder / "mesh.yaml").write_text(
                f"version: 1\nname: honest\ngateway: {{listen: 127.0.0.1:0}}\nnodes: [{node}]\n"
            )
            subprocess.run([*GPUMESH, "up", "-d"], cwd=folder, check=True, capture_output=True)
            try:
                titles = ("via", "n", "served", "TTFT", "e2e", "tok/s", "CPU", "µs/piece", "mesh CPU", "busy", "burst")
                print(LINE.format(*titles, "says"))
                for way in given.via.split(","):
                    for streams in map(int, given.streams.split(",")):
                        read_truth(url)
                        stage = measure(url, way, streams, given.tokens, folder)
                        truth = sorted(read_truth(url), key=lambda stream: stream[2])
                        truth = truth[-stage["requests"] :]  # the others are those of the warm-up
                        print(describe(way, streams, stage, truth), flush=True)
            finally:
                subprocess.run([*GPUMESH, "down"], cwd=folder, check=False, capture_output=True)
                server.terminate()


if __name__ == "__main__":
    main()
