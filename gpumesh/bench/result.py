"""A run's results, and the folder that keeps them: ``result.json`` (schema ``gpumesh.bench/1``), ``requests.jsonl``
(a line for each request) and ``report.html``.

Each file is written beside its place and renamed, so that there is never half of one; a folder that holds a result is
left alone unless asked otherwise. What a result says of hosts came from them: it is cleaned when it is read back too.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gpumesh import __version__, atomic_file
from gpumesh.bench.load import RequestRecord
from gpumesh.bench.scenarios import BenchSettings, Scenario
from gpumesh.bench.stats import Objective
from gpumesh.bench.summary import RouteCost, Scaling, StageResult, request_tpot_ms
from gpumesh.errors import UsageError
from gpumesh.state import MeshState, NodeState
from gpumesh.wire import from_json, to_json

BENCH_SCHEMA = "gpumesh.bench/1"
RESULT_FILE, REQUESTS_FILE, REPORT_FILE = "result.json", "requests.jsonl", "report.html"
# A result of a long sweep is some 100 KB; what is much larger is not one of ours.
MAX_RESULT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class NodeEnvironment:
    """A node as it was found. ``gpus`` are names, ``None`` where they could not be asked for."""

    name: str
    transport: str
    rtt_ms: float | None
    backend: str
    version: str | None
    gpus: tuple[str, ...] | None
    driver: str | None
    parallel: int | None
    simulated: bool


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and on what it was measured: two results can be compared only as far as these agree."""

    gpumesh: str
    python: str
    platform: str
    cpus: int | None
    mesh: str
    embedded: bool
    """Whether the mesh ran in the measuring process; else it was a running one, asked over its control socket."""
    nodes: tuple[NodeEnvironment, ...]


@dataclass(frozen=True, slots=True)
class BenchResult:
    at: datetime
    scenario: Scenario
    settings: BenchSettings
    objective: Objective
    environment: Environment
    stages: tuple[StageResult, ...]
    scaling: Scaling | None = None
    routes: tuple[RouteCost, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def simulated(self) -> bool:
        return any(node.simulated for node in self.environment.nodes)

    @property
    def failed(self) -> int:
        return sum(stage.failed + stage.cut for stage in self.stages)


def describe_environment(state: MeshState, *, embedded: bool) -> Environment:
    return Environment(
        gpumesh=__version__,
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        cpus=os.cpu_count(),
        mesh=state.mesh,
        embedded=embedded,
        nodes=tuple(_node(node) for node in state.nodes),
    )


def _node(node: NodeState) -> NodeEnvironment:
    return NodeEnvironment(
        name=node.name,
        transport=node.tunnel.transport,
        rtt_ms=node.tunnel.rtt_ms,
        backend=node.backend.kind,
        version=node.backend.version,
        gpus=None if node.gpus is None else tuple(gpu.name for gpu in node.gpus),
        driver=node.host.driver,
        parallel=node.load.limit,
        simulated=node.simulated,
    )


def result_json(result: BenchResult) -> dict[str, Any]:
    """The document of ``result.json``."""
    return {"schema": BENCH_SCHEMA, **to_json(result)}


def result_from_json(document: object) -> BenchResult:
    """Raises ``ValueError`` when the document is not ``gpumesh.bench/1``."""
    if not isinstance(document, Mapping):
        raise ValueError("not an object")  # noqa: TRY004 - one kind of error for whatever is wrong with a document
    if document.get("schema") != BENCH_SCHEMA:
        raise ValueError(f"its schema is {document.get('schema')!r}, not {BENCH_SCHEMA!r}")
    try:
        return from_json(BenchResult, document)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(str(error)) from error


def record_json(record: RequestRecord) -> dict[str, Any]:
    """A line of ``requests.jsonl``. Prompts and answers are not kept, only their sizes and times."""
    return {
        "stage": record.stage,
        "index": record.index,
        "route": record.route,
        "node": record.node,
        "attempts": record.attempts,
        "outcome": record.outcome.value,
        "intended_s": round(record.intended_s, 6),
        "sent_s": round(record.sent_s, 6),
        "ended_s": round(record.ended_s, 6),
        "ttft_ms": _rounded(record.ttft_ms),
        "tpot_ms": _rounded(request_tpot_ms(record)),
        "end_to_end_ms": _rounded(record.end_to_end_ms),
        "prompt_tokens": record.prompt_tokens,
        "tokens": record.tokens,
        "counted_pieces": record.counted_pieces,
        "tokens_per_s": _rounded(record.counters.tokens_per_s if record.counters else None),
        "server": to_json(record.counters),
        "done_reason": record.done_reason,
        "error_code": record.error_code,
        "error": record.error,
        "arrivals_s": [round(moment, 6) for moment in record.arrivals_s],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def check_result_folder(folder: Path, *, force: bool = False) -> None:
    """Before measuring for minutes: raises UsageError when the results could not be written there."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="choose another with --out")
    taken = [name for name in (RESULT_FILE, REQUESTS_FILE, REPORT_FILE) if (folder / name).exists()]
    if taken and not force:
        raise UsageError(
            f"{folder} holds a result already ({', '.join(taken)})", hint="choose another with --out, or add --force"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder}: {error.strerror or error}", hint="choose another with --out"
        ) from None


def write_result(folder: Path, result: BenchResult, records: Sequence[RequestRecord], *, force: bool = False) -> None:
    """All three files; ``result.json`` last, so that where it stands the others do too. Raises UsageError."""
    from gpumesh.bench.report import report_html

    check_result_folder(folder, force=force)
    lines = "".join(json.dumps(record_json(record), allow_nan=False) + "\n" for record in records)
    try:
        _put(folder / REQUESTS_FILE, lines)
        _put(folder / REPORT_FILE, report_html(result, records))
        _put(folder / RESULT_FILE, json.dumps(result_json(result), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder}: {error.strerror or error}", hint="choose another with --out"
        ) from None


def _put(path: Path, text: str) -> None:
    atomic_file.replace(path, text, mode=0o644, sync=False)


def read_result(path: Path) -> BenchResult:
    """From a result's folder or its ``result.json``. Raises UsageError for what is neither."""
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        if file.stat().st_size > MAX_RESULT_BYTES:
            raise UsageError(f"{file} is too large to be a result")
        document = json.loads(file.read_bytes())
        return result_from_json(document)
    except OSError as error:
        raise UsageError(
            f"cannot read {file}: {error.strerror or error}", hint="`gpumesh bench run --out DIR` makes one"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not a result of `gpumesh bench`: {error}") from None


def find_newest_result(folder: Path) -> Path | None:
    """The folder of the latest result below ``folder``."""
    found = [(file.stat().st_mtime, file.parent) for file in folder.glob(f"*/{RESULT_FILE}")]
    return max(found)[1] if found else None
