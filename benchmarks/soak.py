"""Load with faults, for minutes or days: no answer may be lost, and no resource may grow.

    python benchmarks/soak.py [--minutes 120] [--warm-up 10] [--fault-every 30] [--clients 24] [--pace 1] [--json]
        [--check]

`gpumesh up` runs in a process of its own over three simulated hosts behind SSH. Some clients stream, some want the
answer in one piece, some leave in mid-answer. One fault happens at a time: a host is killed and started again, is
frozen, refuses, answers 500, cuts its streams, ends them silently, stalls. Each fault lasts a third of the interval.
The stand-in's text depends on the prompt alone, so each answer is compared with the expected text, letter by letter.

The report has the requests by how they ended, as the clients and as the gateway counted them (both must be equal),
wrong texts, and the gateway's memory, open files and threads at the start (after a warm-up) and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from gateway import free_port, program  # noqa: E402

from gpumesh.lab import profile, text  # noqa: E402
from gpumesh.lab.lab import Lab, LabHost  # noqa: E402
from gpumesh.lab.profile import QWEN_7B, Faults, SmiMode  # noqa: E402

MODEL = QWEN_7B.name
WARM_UP_S = 10.0
LEAVING_SHARE = 0.1  # of streamed requests whose client leaves in mid-answer
FAULTS: dict[str, Faults | None] = {
    "killed": None,
    "frozen": None,
    "refuses": Faults(refuse=True),
    "answers 500": Faults(status=500, paths=("/api/chat",)),
    "cuts streams": Faults(cut_after_tokens=7, paths=("/api/chat",)),
    "ends streams silently": Faults(end_after_tokens=5, paths=("/api/chat",)),
    "errors in streams": Faults(error_line_after_tokens=3, paths=("/api/chat",)),
    "stalls": Faults(stall_after_tokens=9, paths=("/api/chat",)),
    "SSH connections dropped": None,
    "nvidia-smi hangs": Faults(nvidia_smi=SmiMode.HANG),
}


@dataclass
class Tally:
    """The requests as the clients saw them. ``wrong``: with another text than expected; ``cut``: streams without an
    end; ``left``: the client left in mid-answer."""

    asked: int = 0
    right: int = 0
    wrong: int = 0
    failed: int = 0
    cut: int = 0
    left: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def hosts(pace: float) -> tuple[profile.HostProfile, ...]:
    return tuple(
        profile.make_host(
            name, models=(QWEN_7B,), tokens_per_s=rate * pace, load_s=0.2, slots=4, answer_tokens=(20, 80)
        )
        for name, rate in (("one", 200.0), ("two", 150.0), ("three", 250.0))
    )


def expected_text(prompt: str) -> str:
    rendered = text.render_messages([{"role": "user", "content": prompt}])
    return "".join(text.generate_text(rendered, model=MODEL, length_range=(20, 80)).tokens)


async def client(url: str, number: int, tally: Tally, until: float) -> None:
    rng = random.Random(number)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        while time.monotonic() < until:
            prompt = f"{number}: {rng.random()}"
            streamed = rng.random() < 0.8
            body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": streamed}
            leave = streamed and rng.random() < LEAVING_SHARE
            tally.asked += 1
            try:
                await _send_request(session, url, body, prompt, leave, tally)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                tally.failed += 1
                tally.errors[repr(error)[:120]] += 1


async def _send_request(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], prompt: str, leave: bool, tally: Tally
) -> None:
    async with session.post(f"{url}/api/chat", json=body, timeout=aiohttp.ClientTimeout(total=120)) as response:
        if response.status != 200:
            tally.failed += 1
            tally.errors[f"{response.status}: {(await response.text())[:120]}"] += 1
            return
        answer, done = "", False
        async for line in response.content:
            frame = json.loads(line)
            if "error" in frame:
                tally.cut += 1
                tally.errors[str(frame["error"])[:160]] += 1
                return
            answer += frame["message"]["content"]
            done = frame["done"]
            if leave and len(answer) > 20:
                tally.left += 1
                return
    if not done:
        tally.cut += 1
    elif answer != expected_text(prompt):
        tally.wrong += 1
        tally.errors[f"wrong text: {answer!r:.200} for {prompt}"] += 1
    else:
        tally.right += 1


@contextlib.asynccontextmanager
async def inject_fault(host: LabHost, name: str) -> AsyncIterator[None]:
    """The host has this fault while the context is open."""
    if name == "killed":
        await host.kill()
        yield
        await host.restart()
    elif name == "frozen":
        host.freeze()
        yield
        host.thaw()
    elif name == "SSH connections dropped":
        await host.drop_connections()
        yield
    else:
        await host.set_faults(FAULTS[name] or Faults())
        yield
        await host.set_faults(Faults())


async def inject_faults(lab: Lab, every_s: float, until: float, seed: int, quiet: bool) -> Counter[str]:
    """Injects one fault after the other, all kinds in random order before any comes again. Returns their numbers."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    names = list(FAULTS)
    order: list[str] = []
    while time.monotonic() + every_s < until:
        await asyncio.sleep(every_s * 2 / 3)
        order = order or rng.sample(names, len(names))
        name, host = order.pop(), rng.choice(list(lab.hosts.values()))
        if not quiet:
            print(f"{time.strftime('%H:%M:%S')} {host.name} {name}", file=sys.stderr, flush=True)
        async with inject_fault(host, name):
            await asyncio.sleep(every_s / 3)
        counts[name] += 1
    return counts


@dataclass(frozen=True)
class ProcessUsage:
    rss_kb: int
    files: int
    threads: int
    children: int


def process_usage(pid: int) -> ProcessUsage:
    status = Path(f"/proc/{pid}/status").read_text()
    fields = {key: int(re.search(rf"^{key}:\s+(\d+)", status, re.MULTILINE)[1]) for key in ("VmRSS", "Threads")}  # type: ignore[index]
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    open_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return ProcessUsage(fields["VmRSS"], open_files, fields["Threads"], len(children))


async def wait_for_idle_usage(url: str, pid: int) -> ProcessUsage:
    """The use of resources when nothing is in flight and all nodes are healthy again."""
    async with asyncio.timeout(90), aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{url}/mesh/status") as response:
                status = await response.json()
            busy = status["gateway"]["in_flight"] + status["gateway"]["queued"]
            if not busy and all(node["health"] == "healthy" for node in status["nodes"]):
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(2.0)
    return process_usage(pid)


async def count_outcomes(url: str) -> dict[str, int]:
    """The number of requests for each outcome, as the gateway counted them."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        page = await response.text()
    counts: Counter[str] = Counter()
    for labels, value in re.findall(r"^gpumesh_requests_total\{(.*)\} (\S+)$", page, re.MULTILINE):
        if 'route="/api/chat"' in labels:
            outcome = re.search(r'outcome="([^"]+)"', labels)
            counts[outcome[1] if outcome else "?"] += int(float(value))
    return dict(counts)


async def soak(
    *,
    minutes: float,
    fault_every_s: float,
    clients: int,
    pace: float = 1.0,
    seed: int = 7,
    warm_up_s: float = WARM_UP_S,
    quiet: bool = False,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpumesh-soak-") as name:
        folder = Path(name)
        runtime = folder / "run"
        runtime.mkdir(mode=0o700)
        async with Lab(hosts(pace), folder) as lab:
            port = free_port()
            file = lab.write_config(folder / "mesh.yaml", listen=f"127.0.0.1:{port}")
            argv = (sys.executable, "-m", "gpumesh", "--config", str(file), "--quiet", "up")
            environment = {"XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(HERE.parent), "HOME": str(folder)}
            async with program(*argv, port=port, folder=folder, **environment) as process:
                url = f"http://127.0.0.1:{port}"
                await wait_for_idle_usage(url, process.pid)
                warm_up = Tally()
                until = time.monotonic() + warm_up_s
                await asyncio.gather(*(client(url, -number, warm_up, until) for number in range(1, clients + 1)))
                before = await wait_for_idle_usage(url, process.pid)
                warm_up_outcomes = Counter(await count_outcomes(url))
                tally = Tally()
                started_at = time.monotonic()
                until = started_at + minutes * 60
                async with asyncio.TaskGroup() as group:
                    faults = group.create_task(inject_faults(lab, fault_every_s, until, seed, quiet))
                    for number in range(clients):
                        group.create_task(client(url, number, tally, until))
                after = await wait_for_idle_usage(url, process.pid)
                outcomes = Counter(await count_outcomes(url)) - warm_up_outcomes
    return {
        "minutes": round((time.monotonic() - started_at) / 60, 1),
        "clients": asdict(tally),
        "gateway": dict(outcomes),
        "balanced": sum(outcomes.values()) == tally.asked,
        "faults": dict(faults.result()),
        "before": asdict(before),
        "after": asdict(after),
    }


def list_problems(figures: dict[str, Any]) -> list[str]:
    """A sentence for each figure that is not as it must be."""
    clients, before, after = figures["clients"], figures["before"], figures["after"]
    problems = [f"{clients[name]} {name}" for name in ("failed", "wrong", "cut") if clients[name]]
    if not figures["balanced"]:
        problems.append(f"the books do not balance: {clients['asked']} asked, {figures['gateway']}")
    for name, allowed in (("files", 8), ("threads", 0), ("children", 0)):
        if after[name] > before[name] + allowed:
            problems.append(f"{name} grew from {before[name]} to {after[name]}")
    if after["rss_kb"] > before["rss_kb"] * 1.1 + 8192:
        problems.append(f"memory grew from {before['rss_kb']} to {after['rss_kb']} KB")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--warm-up", type=float, default=WARM_UP_S, metavar="S")
    parser.add_argument("--fault-every", type=float, default=30.0, metavar="S")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--pace", type=float, default=1.0, help="factor of the hosts' tokens per second")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 when something was lost or grew")
    given = parser.parse_args()
    figures = asyncio.run(
        soak(
            minutes=given.minutes,
            fault_every_s=given.fault_every,
            clients=given.clients,
            pace=given.pace,
            seed=given.seed,
            warm_up_s=given.warm_up,
        )
    )
    if given.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name:<10} {value}")
    problems = list_problems(figures)
    print("\n".join(problems) or "nothing was lost and nothing grew", file=sys.stderr)
    return 1 if problems and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
