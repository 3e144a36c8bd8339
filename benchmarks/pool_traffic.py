"""What goes between a pool's head and its worker, counted by command, and what planning/rpc_traffic.py expects.

Also the time of a load over a way of this bandwidth and round trip, with the worker's cache and without; and what the
way adds to the time until the first token of a prompt.

    python benchmarks/pool_traffic.py count [--option=-kvu ...]
    python benchmarks/pool_traffic.py load [--rtt-ms MS] [--mbit RATE] [--layers N] [--dim N]
    python benchmarks/pool_traffic.py prompt [--rtt-ms MS] [--mbit RATE] [--layers N] [--dim N]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path

from pool_lab import Distance, Head, Traffic, measure_echo, running_pool
from pool_speed import CONTEXT, Rates, members_of, shape_of

from gpumesh.pools.base import PathKind, WorkerPath
from gpumesh.pools.planning.rpc_traffic import estimate_new_graph, estimate_step
from gpumesh.pools.planning.speed import forecast_load, forecast_prompt_way_s
from tests.real.tiny_model import write_tiny_model

SHORT, LONG, GROWING = 60, 160, 360  # tokens; the longest one needs one new graph more


async def count(arguments: argparse.Namespace, folder: Path) -> None:
    shape = shape_of(arguments.layers, arguments.dim)
    model = write_tiny_model(folder / "tiny.gguf", layers=arguments.layers, dim=arguments.dim)
    layers = arguments.layers // 2 + 1  # the output counts as one
    for streams in (1, 4):
        async with running_pool(
            folder,
            model,
            [Distance(arguments.rtt_ms)],
            worker_layers=layers,
            streams=streams,
            context=CONTEXT,
            options=arguments.option,
        ) as head:
            print(f"\n{streams} streams, {layers - 1} layers and the output on the worker")
            show("load", await head.relays[0].take_traffic())
            await answer(head, streams, 8)
            short, long, growing = [await answer(head, streams, tokens) for tokens in (SHORT, LONG, GROWING)]
            show(f"an answer of {SHORT} tokens", short)
            show("a step", difference(long, short), LONG - SHORT)
            expected = estimate_step(shape, tokens=streams, filled=100, has_output=True)
            print(f"{'  expected':30} {expected.waits:8.2f} {expected.sent_bytes:9.0f} {expected.received_bytes:9.0f}")
            steps = (GROWING - LONG) / (LONG - SHORT)
            graph = difference(difference(growing, long), difference(long, short), steps)
            show("one new graph", graph)
            expected = estimate_new_graph(shape, layers - 1, protocol=None)
            print(f"{'  expected':30} {expected.waits:8.2f} {expected.sent_bytes:9.0f} {expected.received_bytes:9.0f}")


async def answer(head: Head, streams: int, tokens: int) -> Traffic:
    await head.relays[0].take_traffic()
    await head.generate_together(streams, tokens)
    return await head.relays[0].take_traffic()


def difference(more: Traffic, less: Traffic, factor: float = 1.0) -> Traffic:
    commands = {name: round(count - factor * less.commands.get(name, 0)) for name, count in more.commands.items()}
    return Traffic(
        round(more.waits - factor * less.waits),
        round(more.sent_bytes - factor * less.sent_bytes),
        round(more.received_bytes - factor * less.received_bytes),
        {name: count for name, count in commands.items() if count},
    )


def show(what: str, traffic: Traffic, steps: int = 1) -> None:
    commands = ", ".join(f"{name} {count / steps:g}" for name, count in sorted(traffic.commands.items()))
    waits, sent, received = (value / steps for value in (traffic.waits, traffic.sent_bytes, traffic.received_bytes))
    print(f"{what:30} {waits:8.2f} waits {sent:9.0f} B up {received:9.0f} B down: {commands}", flush=True)


async def load(arguments: argparse.Namespace, folder: Path) -> None:
    shape = shape_of(arguments.layers, arguments.dim)
    model = write_tiny_model(folder / "tiny.gguf", layers=arguments.layers, dim=arguments.dim)
    layers = arguments.layers // 2 + 1
    distance = Distance(arguments.rtt_ms, arguments.mbit)
    path = WorkerPath(PathKind.THROUGH_US, arguments.rtt_ms, arguments.mbit * 1e6 / 8)
    members = members_of(shape, Rates(1e9, 0.0), 1, layers, 1, path)
    cache = folder / "cache"
    for what, cached in (("first load", frozenset[str]()), ("from the worker's cache", frozenset({members[1].node}))):
        expected = forecast_load(shape, members, cached=cached)
        async with running_pool(folder, model, [distance], worker_layers=layers, context=CONTEXT, cache=cache) as head:
            show(what, await head.relays[0].take_traffic())
            print(f"  ready after {head.ready_s:.2f} s, predicted {expected.load_s or 0:.2f} s")
    print("cache:", sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()), "bytes")


async def prompt(arguments: argparse.Namespace, folder: Path) -> None:
    shape = shape_of(arguments.layers, arguments.dim)
    model = write_tiny_model(folder / "tiny.gguf", layers=arguments.layers, dim=arguments.dim)
    layers = arguments.layers // 2 + 1
    way = Distance(arguments.rtt_ms, arguments.mbit)
    path = WorkerPath(PathKind.THROUGH_US, await measure_echo(way), arguments.mbit * 1e6 / 8, protocol=5)
    members = members_of(shape, Rates(1e9, 0.0), 1, layers, 1, path)
    first_token_s: dict[Distance, dict[int, float]] = {}
    for distance in (Distance(), way):
        async with running_pool(folder, model, [distance], worker_layers=layers, context=2048) as head:
            await head.generate(8)
            first_token_s[distance] = {tokens: await first_token(head, tokens) for tokens in (20, 500, 1500)}
    for tokens, near_s in first_token_s[Distance()].items():
        added_s = first_token_s[way][tokens] - near_s
        predicted_s = forecast_prompt_way_s(shape, members, tokens=tokens)
        print(
            f"prompt of {tokens:5} tokens: {near_s:.2f} s, the way adds {added_s:.2f} s, predicted {predicted_s:.2f} s"
        )


async def first_token(head: Head, tokens: int) -> float:
    """Seconds until the first token of a prompt of so many tokens (bytes). The lengths differ a little, because the
    graph of the same length would be used again."""
    prompts = [f"{number} " + "x" * (tokens - 3 * number) for number in range(3)]
    answers = [await head.generate(1, prompt=prompt) for prompt in prompts]
    return statistics.median([float(answer.timings["prompt_ms"]) for answer in answers]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["count", "load", "prompt"])
    parser.add_argument("--rtt-ms", type=float, default=0.0)
    parser.add_argument("--mbit", type=float, default=200.0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--option", action="append", default=[], help="a further option of llama-server")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run({"count": count, "load": load, "prompt": prompt}[arguments.what](arguments, Path(folder)))


if __name__ == "__main__":
    main()
