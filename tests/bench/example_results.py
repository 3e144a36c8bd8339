"""Hand-made records, stages and results for the tests of the benchmark's pure parts."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpumesh.backends.base import ChatRequest, Message, ServerCounters
from gpumesh.bench.figures.gpu_meter import GpuUse
from gpumesh.bench.figures.routes.route_costs import route_costs
from gpumesh.bench.figures.scaling import scaling
from gpumesh.bench.figures.summary import StageResult, summarize_stage
from gpumesh.bench.load.samples import ClientLoad, LoadSample, SampleOutcome, StageRun
from gpumesh.bench.result_folder import check_result_folder
from gpumesh.bench.result_journal import ResultJournal
from gpumesh.bench.results.result import BenchResult, Environment, NodeEnvironment
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.settings import BenchSettings, Scenario
from gpumesh.bench.workload.stages import PlannedRequest, Stage, StageKind

MODEL = "qwen2.5:7b"
IDLE = ClientLoad(cpu=0.1, lag_p99_ms=0.4)
CHAT = ChatRequest(MODEL, (Message("user", "Hello"),))


def record(
    index: int = 0,
    *,
    sent_s: float = 0.0,
    ttft_ms: float = 100.0,
    gap_ms: float = 10.0,
    tokens: int = 11,
    server_ms: float | None = None,
    **changes: Any,
) -> LoadSample:
    """An answer whose first piece comes after ``ttft_ms`` and whose others follow each ``gap_ms``; its last frame with
    the last of them. ``server_ms``: the server's own total; then it has counters, whose clock starts
    at the first token."""
    arrivals = tuple(sent_s + (ttft_ms + gap_ms * number) / 1000.0 for number in range(tokens))
    counters = None
    if server_ms is not None:
        counters = ServerCounters(
            prompt_tokens=7, tokens=tokens, total_ms=server_ms, load_ms=0.0, eval_ms=gap_ms * (tokens - 1)
        )
    usual: dict[str, Any] = {
        "stage": "mesh",
        "index": index,
        "outcome": SampleOutcome.SERVED,
        "intended_s": sent_s,
        "sent_s": sent_s,
        "ended_s": arrivals[-1] if arrivals else sent_s,
        "node": "iceland",
        "attempts": 1,
        "arrivals_s": arrivals,
        "tokens": tokens,
        "prompt_tokens": 7,
        "counters": counters,
        "done_reason": "length",
    }
    return LoadSample(**{**usual, **changes})


def failed_record(index: int = 0, *, sent_s: float = 0.0, error: str = "no answer", **changes: Any) -> LoadSample:
    """One that never began."""
    usual: dict[str, Any] = {
        "stage": "mesh",
        "index": index,
        "outcome": SampleOutcome.FAILED,
        "intended_s": sent_s,
        "sent_s": sent_s,
        "ended_s": sent_s + 0.5,
        "node": "iceland",
        "tokens": None,
        "error_code": "backend-unreachable",
        "error": error,
    }
    return LoadSample(**{**usual, **changes})


def stage(name: str = "mesh", *, count: int = 1, concurrency: int | None = 1, **changes: Any) -> Stage:
    return Stage(
        name, changes.pop("kind", StageKind.MESH), (PlannedRequest(CHAT),) * count, concurrency=concurrency, **changes
    )


def make_stage_run(
    *records: LoadSample, duration_s: float | None = None, of: Stage | None = None, **changes: Any
) -> StageRun:
    duration = max((one.ended_s for one in records), default=0.0) if duration_s is None else duration_s
    return StageRun(of or stage(count=len(records)), records, duration, changes.pop("client", IDLE), **changes)


def summarize_only(run: StageRun, objective: Objective | None = None) -> StageResult:
    (only,) = summarize_stage(run, objective or Objective())
    return only


def result(*stages: StageResult, scenario: Scenario = Scenario.QUICK, **changes: Any) -> BenchResult:
    node = NodeEnvironment(
        name="iceland",
        transport="sshtunnel",
        rtt_ms=41.2,
        backend="ollama",
        version="0.12.6",
        gpus=("NVIDIA GeForce RTX 4090",),
        driver="550.54.15",
        parallel=1,
        simulated=False,
    )
    environment = Environment(
        gpumesh="0.1.0",
        python="3.11.7",
        platform="Linux-6.1",
        cpus=2,
        mesh="home",
        embedded=True,
        nodes=changes.pop("nodes", (node,)),
    )
    usual: dict[str, Any] = {
        "at": datetime(2026, 11, 24, 4, 10, tzinfo=UTC),
        "scenario": scenario,
        "settings": BenchSettings(MODEL, concurrency=(1, 2)),
        "objective": Objective(),
        "environment": environment,
        "stages": stages,
        "scaling": scaling(stages),
        "routes": route_costs(stages),
        "notes": (),
    }
    return BenchResult(**{**usual, **changes})


RECORDS = (record(0, server_ms=190.0), record(1, sent_s=0.3, server_ms=190.0), failed_record(2))


def write_result(folder: Path, made: BenchResult, records: Sequence[LoadSample]) -> None:
    """Writes the files of a result to the folder, which is made if it does not exist."""
    check_result_folder(folder, force=True)
    journal = ResultJournal(folder)
    journal.keep(made, records)
    journal.finish()


def full_result() -> BenchResult:
    """A result in which every optional part is present."""
    alone = [
        summarize_only(make_stage_run(record(stage=name), of=stage(name, kind=StageKind.NODE, node=name)))
        for name in ("iceland", "moon")
    ]
    (mesh,) = summarize_stage(make_stage_run(*RECORDS), Objective(), GpuUse(1, 9, 80.0, 300.0, 600.0, 8000))
    disturbed = summarize_only(make_stage_run(*RECORDS, disturbed_s=(0.1, 0.3), disturbance="iceland drained"))
    of = stage("iceland", kind=StageKind.NODE, node="iceland")
    routes = summarize_stage(make_stage_run(record(route="tunnel"), record(route="mesh"), of=of), Objective())
    unknown = NodeEnvironment("moon", "sshtunnel", None, "ollama", None, None, None, None, simulated=True)
    made = result(*alone, mesh, disturbed, *routes, nodes=(unknown,), notes=("a note",))
    assert made.scaling is not None
    assert made.routes
    return made


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond ``size`` bytes: writes fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
