"""A mesh in a process of its own that works on a batch and is killed again and again, and the check of its results."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gpumesh.batches.base import BatchStore
from gpumesh.batches.values import PROMPT_ENDPOINT, Batch, NewBatch
from gpumesh.daemon import paths
from gpumesh.lab import text

GPUMESH = Path(sys.executable).with_name("gpumesh")
ANSWER_TOKENS = (10, 20)


class MeshProcess:
    """`gpumesh up` for the mesh.yaml ``config``, with folders of its own below ``folder``."""

    def __init__(self, folder: Path, config: Path, *options: str) -> None:
        self.config = config
        self._folder = folder
        self._options = options
        self._process: asyncio.subprocess.Process | None = None
        self._variables = {
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": tempfile.mkdtemp(prefix="gm-"),  # the path of a socket may not be long
            "XDG_STATE_HOME": str(folder / "state"),
            "GPUMESH_CONFIG": str(config),
        }

    @property
    def batches(self) -> Path:
        """The SQLite file with the batches of this mesh."""
        with patch.dict(os.environ, self._variables):
            return paths.for_config(self.config).batches

    async def start(self) -> None:
        """Returns when the process has begun; it opens its tunnels afterwards."""
        with (self._folder / "up.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                str(GPUMESH),
                "--quiet",
                "up",
                *self._options,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._variables},
            )

    async def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends the process by a signal, and waits for its end."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.send_signal(number)
            await process.wait()

    async def close(self) -> None:
        """Ends the process, and removes its runtime folder."""
        await self.end()
        shutil.rmtree(self._variables["XDG_RUNTIME_DIR"], ignore_errors=True)

    def log(self) -> str:
        """The last of what the process has written."""
        return (self._folder / "up.log").read_text(errors="replace")[-4000:]


def write_mesh_yaml(file: Path, urls: Sequence[str], *, slots: int, listen: str, more: dict[str, Any]) -> None:
    """A mesh.yaml of nodes without SSH. ``more``: other sections."""
    backends = [{"url": url, "max_parallel": slots} for url in urls]
    nodes = [{"name": f"n{number}", "backend": backend} for number, backend in enumerate(backends, 1)]
    file.write_text(
        json.dumps({"name": "killed", "gateway": {"listen": listen}, "nodes": nodes, **more})
    )  # JSON is YAML


async def submit_prompts(store: BatchStore, count: int, model: str) -> Batch:
    """A batch of prompts, each with an answer that can be told from all others."""

    async def lines() -> AsyncIterator[bytes]:
        for number in range(count):
            yield json.dumps({"prompt": _prompt(number), "model": model}).encode() + b"\n"

    file = await store.create_file("prompts.jsonl", lines())
    return await store.create_batch(NewBatch(PROMPT_ENDPOINT, file.id, "prompts.jsonl"))


def _prompt(number: int) -> str:
    return f"{number}: what is it?"


@dataclass(frozen=True)
class CheckedResults:
    """What the results of a batch of ``submit_prompts`` are. ``right``: with the text that this prompt must get."""

    results: int
    right: int
    lines_with_several: int
    failed: int


async def check_results(store: BatchStore, batch: Batch, model: str) -> CheckedResults:
    """Reads all results in the order of their recording."""
    lines: Counter[int] = Counter()
    right = failed = 0
    after = ""
    while results := await store.read_results(batch.id, after=after, limit=500):
        after = results[-1].position
        for result in results:
            lines[result.line] += 1
            failed += result.failed
            line = json.loads(result.content)
            rendered = text.render_messages([{"role": "user", "content": _prompt(result.line - 1)}])
            tokens = text.generate_text(rendered, model=model, length_range=ANSWER_TOKENS).tokens
            right += line["index"] == result.line - 1 and line["response"] == "".join(tokens)
    several = sum(count > 1 for count in lines.values())
    return CheckedResults(sum(lines.values()), right, several, failed)


async def wait_for_results(store: BatchStore, batch: Batch, count: int, *, limit_s: float) -> Batch:
    """Waits until so many requests have a result, or the batch has ended. Raises TimeoutError."""
    ends_at = time.monotonic() + limit_s
    while True:
        batch = await store.get_batch(batch.id)
        if batch.status.has_ended or batch.counts.completed + batch.counts.failed >= count:
            return batch
        if time.monotonic() > ends_at:
            raise TimeoutError(f"{batch.counts} after {limit_s:.0f} s")
        await asyncio.sleep(0.02)
