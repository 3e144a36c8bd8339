"""The time of the balancer's decisions, part by part, in us of CPU (the best of several runs, if not said otherwise).

    python benchmarks/decisions.py [prefixes ...] [--json FILE]

- ``prefixes``: reading the print of a prompt from a body, and finding the nodes that have its beginning
  (``gateway/prompt_reading.py``, ``balancer/prefixes/``).
- ``scheduler``: all decisions for one request, with 4, 16 and 1,000 nodes, while nobody or 10,000 requests wait
  (``balancer/scheduler.py``). These are medians over single requests.

Each row has the budget that was set for it. A row above its budget is marked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import PlacedRequest
from gpumesh.balancer.base import Demand, Priority, ResidencyKey
from gpumesh.balancer.prefixes import PrefixIndex, PromptHasher, PromptPrint
from gpumesh.balancer.prefixes.prints import BLOCK_ENDS, count_blocks
from gpumesh.balancer.scheduling.scheduler import Placement, Scheduler
from gpumesh.gateway.body_parsers.json_members import Members, read_small_members, scan_members
from gpumesh.gateway.model_requests import MODEL_ROUTES
from gpumesh.gateway.prompt_reading import PromptReader
from gpumesh.text.model_names import full_name
from gpumesh.topology import BackendKind, PolicyKind

RUNS = 7
RUN_S = 0.05  # about the time of one run
KEY = ("llama3.1:8b", 8192, ())
CHAT = MODEL_ROUTES["/v1/chat/completions"]
MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One figure, and its budget if it has one."""

    name: str
    us: float
    budget_us: float | None = None

    def __str__(self) -> str:
        budget = "" if self.budget_us is None else f"  (budget {self.budget_us:g})"
        mark = "  ABOVE" if self.budget_us is not None and self.us > self.budget_us else ""
        return f"{self.name:<76}{self.us:9.2f}{budget}{mark}"


def measure_us(work: Callable[[], object]) -> float:
    """The CPU time of one call of ``work``, in us: the least of ``RUNS`` means."""
    started_at = time.process_time()
    work()
    calls = max(int(RUN_S / max(time.process_time() - started_at, 1e-6)), 1)
    best_s = float("inf")
    for _ in range(RUNS):
        started_at = time.process_time()
        for _ in range(calls):
            work()
        best_s = min(best_s, (time.process_time() - started_at) / calls)
    return best_s * 1e6


# -- prefixes --------------------------------------------------------------------------------------------------------


def measure_prefixes() -> Iterator[Row]:
    yield from measure_prints()
    yield from measure_hashes()
    yield from measure_index()


def make_body(size: int) -> bytes:
    """A chat of about ``size`` bytes: a system prompt and messages of 400 bytes."""
    messages = [{"role": "system", "content": "You are a careful assistant. " * 10}]
    for number in range(size // 430):
        messages.append({"role": "user", "content": f"Question {number}: why is the sky blue? " * 11})
    return json.dumps({"model": "llama3.1:8b", "stream": True, "temperature": 0.2, "messages": messages}).encode()


def run_steps(steps: Generator[None, None, Any]) -> tuple[Any, float]:
    """The result of a generator, and its longest step in us."""
    longest_s = 0.0
    while True:
        started_at = time.process_time()
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value, max(longest_s, time.process_time() - started_at) * 1e6
        longest_s = max(longest_s, time.process_time() - started_at)


def read_members(body: bytes) -> Members:
    members = read_small_members(body)
    return run_steps(scan_members(body))[0] if members is None else members


def measure_prints() -> Iterator[Row]:
    reader = PromptReader(PromptHasher(os.urandom(16)))
    for size, budget_us in ((4 << 10, 30.0), (32 << 10, None)):
        members = read_members(make_body(size))
        work = lambda members=members: reader.read_prompt(CHAT, members, KEY)  # noqa: E731
        yield Row(f"print of a body of {size >> 10} KiB, its members already read", measure_us(work), budget_us)
    members = read_members(make_body(4 << 10))
    yield Row("hint of a session, not given", measure_us(lambda: reader.read_session({}, members)))
    large = read_members(make_body(MIB))
    yield Row(
        "print of a body of 1 MiB, in steps: all", measure_us(lambda: run_steps(reader.scan_prompt(CHAT, large, KEY)))
    )
    longest_us = min(run_steps(reader.scan_prompt(CHAT, large, KEY))[1] for _ in range(20))
    yield Row("print of a body of 1 MiB, in steps: its longest step", longest_us, 1000.0)


def measure_hashes() -> Iterator[Row]:
    """The hash that is used, beside BLAKE2b over the same blocks."""
    hasher, secret = PromptHasher(os.urandom(16)), os.urandom(16)
    for size in (4 << 10, MIB):
        prompt = os.urandom(size)
        ends = BLOCK_ENDS[: count_blocks(size)]

        def hash_with_blake2b(prompt: bytes = prompt, ends: tuple[int, ...] = ends) -> None:
            state, view, start = hashlib.blake2b(digest_size=8, key=secret), memoryview(prompt), 0
            for end in ends:
                state.update(view[start:end])
                int.from_bytes(state.copy().digest(), "little")
                start = end

        name = f"{size >> 10} KiB in {len(ends)} blocks"
        hash_prompt = lambda prompt=prompt: hasher.hash_prompt(KEY, prompt)  # noqa: E731
        yield Row(f"hash of {name}: SipHash with a secret", measure_us(hash_prompt))
        yield Row(f"hash of {name}: BLAKE2b with a key", measure_us(hash_with_blake2b))


def make_print(name: str, blocks: int = 200) -> PromptPrint:
    """A prompt of so many blocks that begins with no other prompt."""
    return PromptPrint(tuple(hash((name, number)) for number in range(blocks)), BLOCK_ENDS[blocks - 1] + 100)


def cut(prompt: PromptPrint, blocks: int) -> PromptPrint:
    return PromptPrint(prompt.blocks[:blocks], BLOCK_ENDS[blocks - 1] + 100)


def branch(prompt: PromptPrint, blocks: int, name: str) -> PromptPrint:
    """A prompt that begins with the first ``blocks`` of another, and is as long."""
    rest = make_print(name, len(prompt.blocks)).blocks[blocks:]
    return PromptPrint(prompt.blocks[:blocks] + rest, prompt.size)


def make_index(nodes: int) -> PrefixIndex:
    """An index whose nodes hold four prompts of 200 blocks each."""
    index = PrefixIndex()
    for number in range(nodes):
        index.set_capacity(f"n{number}", KEY, slots=4, context_tokens=1 << 20)
    return index


def measure_index() -> Iterator[Row]:
    prompt = make_print("the prompt")

    index = make_index(16)
    for node in range(16):
        index.add(f"n{node}", KEY, branch(prompt, 12 * (node + 1), f"n{node}"), 0.0)
        index.add(f"n{node}", KEY, make_print(f"other {node}"), 0.0)
    assert len(index.match(KEY, prompt)) == 16
    yield Row(
        "match of 200 blocks, 16 nodes: each has another part", measure_us(lambda: index.match(KEY, prompt)), 15.0
    )

    index = make_index(1000)
    for node in range(1000):
        index.add(f"n{node}", KEY, make_print(f"other {node}"), 0.0)
    for node in range(5):
        index.add(f"n{node}", KEY, branch(prompt, 30 * (node + 1), f"n{node}"), 0.0)
    assert len(index.match(KEY, prompt)) == 5
    yield Row("match of 200 blocks, 1,000 nodes: 5 have it", measure_us(lambda: index.match(KEY, prompt)), 20.0)

    index = make_index(1000)
    for node in range(1000):
        index.add(f"n{node}", KEY, branch(prompt, 8, f"n{node}"), 0.0)
    index.add("n7", KEY, cut(prompt, 150), 0.0)
    assert len(index.match(KEY, prompt)) == 1000
    yield Row(
        "match of 200 blocks, 1,000 nodes: all have its system prompt", measure_us(lambda: index.match(KEY, prompt))
    )

    yield from measure_add()


def measure_add() -> Iterator[Row]:
    numbers = count()
    index = make_index(16)
    prints = [make_print(f"prompt {number}") for number in range(40)]

    def add_another() -> None:
        index.add("n0", KEY, prints[next(numbers) % len(prints)], 0.0)

    yield Row("add of 200 new blocks, and of 200 old ones the removal", measure_us(add_another), 20.0)

    system = make_print("system prompt")
    branches = [branch(system, 8, f"branch {number}") for number in range(40)]
    for node in range(16):
        index.add(f"n{node}", KEY, branch(system, 8, f"n{node}"), 0.0)

    def add_branch() -> None:
        index.add("n0", KEY, branches[next(numbers) % len(branches)], 0.0)

    yield Row("add of 192 new blocks after a system prompt of 16 nodes, and a removal", measure_us(add_branch), 20.0)

    conversation = make_print("conversation")
    turns = [cut(conversation, blocks) for blocks in range(10, 201, 2)]

    def add_turn() -> None:
        index.add("n1", KEY, turns[next(numbers) % len(turns)], 0.0)

    yield Row("add of the next turn of a conversation: 2 new blocks", measure_us(add_turn), 20.0)
    note = lambda: index.note_session("n1", KEY, next(numbers) % 400, 5000)  # noqa: E731
    yield Row("note of a session", measure_us(note))


# -- scheduler -------------------------------------------------------------------------------------------------------

DECISION_BUDGET_US = 100.0  # of a request at the median, with 1,000 nodes and 10,000 waiting
SLOTS = 4  # of each node
MODELS = ("llama3.1:8b", "qwen2.5:14b")
SAMPLES = 400


def measure_scheduler() -> Iterator[Row]:
    for nodes in (4, 16, 1000):
        for waiting in (0, 10_000):
            for policy in (PolicyKind.ADAPTIVE, PolicyKind.LEAST_LOADED):
                fleet = BusyFleet(policy, nodes, waiting)
                parts_us = [fleet.serve_one() for _ in range(SAMPLES)]
                name = f"{policy.value}, {nodes:,} nodes, {waiting:,} waiting"
                if policy is PolicyKind.ADAPTIVE:
                    yield Row(f"{name}: a request comes", median(come for come, _, _ in parts_us), DECISION_BUDGET_US)
                    yield Row(f"{name}: another ends, what is learned", median(end for _, end, _ in parts_us))
                    grant_us = median(grant for _, _, grant in parts_us)
                    yield Row(f"{name}: its slot is granted", grant_us, DECISION_BUDGET_US)
                yield Row(f"{name}: all of it", median(map(sum, parts_us)))


class BusyFleet:
    """A fleet with two models, half of its nodes with each, and requests of 8 clients with prompts of 4 KB.

    If requests wait, all slots are taken. Else half of them are free."""

    def __init__(self, policy: PolicyKind, nodes: int, waiting: int) -> None:
        self._now = 1000.0
        self._numbers = count()
        self._scheduler = Scheduler(policy, rng=Random(1), max_queue=2 * waiting + 10)
        self._running: deque[PlacedRequest] = deque()
        for number in range(nodes):
            account = self._scheduler.roster.add(f"n{number}", max_parallel=SLOTS)
            account.kind, account.is_up = BackendKind.OLLAMA, True
            account.models = frozenset(full_name(model) for model in MODELS)
            loaded = {full_name(MODELS[number % 2]): (6000, None)}
            account.residency.replace_with_report(loaded, asked_at=0.0)
            self._scheduler.note_report(account)
        for _ in range(nodes * SLOTS // (1 if waiting else 2)):
            self._take(self._scheduler.place_now(self._make_demand(), self._now, may_wait=False))
        for _ in range(waiting):
            self._scheduler.wait(self._make_demand(), self._now, None)
        self._grant()

    def _make_demand(self) -> Demand:
        number = next(self._numbers)
        model = MODELS[number % 2]
        key = ResidencyKey(full_name(model))
        prompt = make_print(f"conversation {number % 2000}", blocks=5)
        client, priority = f"client {number % 8}", list(Priority)[number % 3]
        return Demand(
            model, residency=key, client=client, priority=priority, prompt_tokens=1000, max_tokens=300, prompt=prompt
        )

    def _take(self, placement: Placement | None) -> None:
        if placement is not None:
            self._scheduler.note_first_token(placement.placed, self._now)
            self._running.append(placement.placed)

    def _grant(self) -> None:
        for _, placement in self._scheduler.grants(self._now):
            self._take(placement)

    def serve_one(self) -> tuple[float, float, float]:
        """A request comes, gets a slot or waits; another ends; its slot goes to one that waits. Returns the CPU time of
        each of these in us."""
        scheduler = self._scheduler
        self._now += 0.01
        demand, counters = self._make_demand(), ServerCounters(100, 300, 4000.0, 0.0, 100.0, 3900.0)
        ending = self._running.popleft()
        times = [time.process_time_ns()]
        placement = scheduler.place_now(demand, self._now)
        if placement is None:
            scheduler.wait(demand, self._now, None)
        times.append(time.process_time_ns())
        scheduler.end(ending, self._now, counters)
        times.append(time.process_time_ns())
        granted = scheduler.grants(self._now)
        scheduler.next_check()
        times.append(time.process_time_ns())
        self._take(placement)
        for _, other in granted:
            self._take(other)
        come_us, end_us, grant_us = ((after - before) / 1000.0 for before, after in pairwise(times))
        return come_us, end_us, grant_us


PARTS: dict[str, Callable[[], Iterator[Row]]] = {"prefixes": measure_prefixes, "scheduler": measure_scheduler}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, if none is named")
    parser.add_argument("--json", type=Path, help="also writes the rows to this file")
    arguments = parser.parse_args()
    rows: dict[str, list[Row]] = {}
    for part in arguments.parts or PARTS:
        print(f"{part}{'us':>{83 - len(part)}}")
        rows[part] = []
        for row in PARTS[part]():
            print(f"  {row}", flush=True)
            rows[part].append(row)
    if arguments.json:
        document = {part: [asdict(row) for row in part_rows] for part, part_rows in rows.items()}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
