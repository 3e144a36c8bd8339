"""What fuzzing found, and the faults that are known from elsewhere: each file of ``corpus/`` once more.

In process what one parser reads; the rest over real sockets, on a mesh in a process of its own, beside honest streams.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import mutators, parsers, wire
from tests.fuzz.cases import CORPUS, Case, Part, corpus, dump, load, save

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
STALL_MS = 400.0  # caused by the gateway itself; the 15 minutes of benchmarks/fuzz.py allow 100

IN_PROCESS = corpus(*parsers.TARGETS)
UPSTREAM = corpus("upstream")
GREETINGS = corpus("greeting")
ON_A_MESH = [path for path in corpus() if path not in (*IN_PROCESS, *UPSTREAM, *GREETINGS)]


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=str(path.relative_to(CORPUS))) for path in paths]


@pytest.mark.parametrize("target", parsers.TARGETS)
def test_a_good_input_is_read(target: str) -> None:
    for seed in parsers.TARGETS[target].seeds:
        parsers.run(Case(target, (Part(seed),)))


@pytest.mark.parametrize("path", named(IN_PROCESS))
def test_a_parser_survives_the_corpus(path: Path) -> None:
    parsers.run(load(path))


@pytest.mark.parametrize("path", named(UPSTREAM))
async def test_the_client_of_the_hot_path(path: Path) -> None:
    await wire.upstream(load(path))


@pytest.mark.parametrize("path", named(GREETINGS))
async def test_a_greeting_survives_the_probes(path: Path) -> None:
    await wire.greet(load(path))


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_on_a_mesh(tmp_path: Path) -> None:
    """No 500, no traceback, honest nodes healthy, honest streams whole and not held up."""
    arguments = ("--json", "--findings", str(tmp_path), "--replay", *map(str, ON_A_MESH))
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(FUZZ), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"{out.decode()}\n{err.decode()}"
    figures = json.loads(out)
    assert figures["failed"] == []
    assert figures["streams"]["lost"] == 0
    assert figures["streams"]["tokens"] > 100
    # A parser that blocks the loop uses CPU time. A delay in which the gateway did not run is caused by the machine.
    stalls = [stall for stall in figures["streams"]["stalls"] if min(stall["own_ms"], stall["ran_ms"]) > STALL_MS]
    assert stalls == []


def test_a_case_survives_saving_and_loading(tmp_path: Path) -> None:
    case = Case("request", (Part(bytes(range(256))), Part(b"a", 1000, apart=True), Part(b"\r\n")), "a note")
    path = save(case, tmp_path)
    assert load(path) == case
    assert [len(piece) for piece in case.writes()] == [256, *[1] * 1000, 2]
    assert case.data == bytes(range(256)) + b"a" * 1000 + b"\r\n"


def test_a_seed_reproduces_its_cases() -> None:
    def cases(seed: int) -> list[str]:
        rng = Random(seed)
        return [dump(mutators.mutate("request", wire.request_seeds("m"), rng, http=True)) for _ in range(15)]

    assert cases(1) == cases(1)
    assert cases(1) != cases(2)


def test_the_harness_finds_slow_greedy_and_raising_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: what it looks for, it sees."""

    def slow(_pieces: Sequence[bytes]) -> None:
        until = time.process_time() + 0.5
        while time.process_time() < until:
            pass

    def greedy(pieces: Sequence[bytes]) -> None:
        _ = [bytearray(1 << 20) for _ in b"".join(pieces)[:60]]

    def raises(pieces: Sequence[bytes]) -> None:
        int(b"".join(pieces))

    for name, function in (("slow", slow), ("greedy", greedy), ("raises", raises)):
        monkeypatch.setitem(parsers.TARGETS, name, parsers.FuzzTarget(function, ()))
    with pytest.raises(AssertionError, match="CPU time"):
        parsers.run(Case("slow", (Part(b"a"),)))
    with pytest.raises(AssertionError, match="MiB for"):
        parsers.run(Case("greedy", (Part(b"a", 60),)))
    with pytest.raises(ValueError, match="invalid literal"):
        parsers.run(Case("raises", (Part("0.²".encode()),)))
