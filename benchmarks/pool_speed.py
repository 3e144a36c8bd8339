"""Predicted against measured speed of a pool at a distance: the forecast of gpumesh/pools/planning and llama-server.

    python benchmarks/pool_speed.py [--rtt-ms MS ...] [--workers N ...] [--streams N ...] [--tokens N] [--rounds N]
        [--json FILE] [--check]

A llama-server with layers of its own has one or two ggml-rpc-servers behind links with a round trip
(delaying_relay.py). The forecast knows the model's shape, the split, and the round trip of an echo through the same
link. It also knows the rate of this machine's CPU, which is measured first in the same pool without a distance: with
one stream, and with as many as are measured later. Nothing is fitted to a distance. ``--check`` exits 1 unless all
tokens/s are within 25 %.

Other load on the machine makes the figures worthless: `chrt -f 20 taskset -c 0,1 python benchmarks/pool_speed.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pool_lab import Distance, Head, measure_echo, rate_of, running_pool

from gpumesh.pools.base import (
    DeviceOffer,
    DeviceShare,
    MemberPlan,
    ModelShape,
    PathKind,
    SpeedForecast,
    WorkerPath,
)
from gpumesh.pools.planning.speed import forecast_speed
from tests.real.tiny_model import VOCABULARY, write_tiny_model

CONTEXT = 1024
PROMPT_TOKENS = 20
PROTOCOL = 5  # the major version that build 10434 speaks
TOLERANCE = 0.25


@dataclass(frozen=True)
class Rates:
    """What was measured of the CPU."""

    bytes_per_s: float
    token_cost: float


@dataclass(frozen=True)
class Point:
    """One comparison, in tokens per second of all streams together."""

    workers: int
    rtt_ms: float
    measured_rtt_ms: float
    streams: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def shape_of(layers: int, dim: int) -> ModelShape:
    """The shape of what ``write_tiny_model`` writes: 32-bit weights, without grouped queries."""
    layer_bytes = 4 * (4 * dim * dim + 3 * 2 * dim * dim + 2 * dim)
    table_bytes = 4 * VOCABULARY * dim
    return ModelShape(
        architecture="llama",
        name="tiny",
        file_type="F32",
        layer_bytes=(layer_bytes,) * layers,
        input_bytes=table_bytes,
        output_bytes=table_bytes + 4 * dim,
        kv_elements=(2 * dim,) * layers,
        embedding=dim,
        vocabulary=VOCABULARY,
        heads=4,
        trained_context=4096,
        parameters=(layer_bytes * layers + 2 * table_bytes) // 4,
        file_bytes=layer_bytes * layers + 2 * table_bytes,
    )


def members_of(
    shape: ModelShape, rates: Rates, workers: int, worker_layers: int, streams: int, path: WorkerPath
) -> list[MemberPlan]:
    """The split that ``running_pool`` starts: the head's CPU has the first layers."""
    device = DeviceOffer("CPU", None, None, 0, rates.bytes_per_s, token_cost=rates.token_cost)
    first = shape.layers + 1 - worker_layers
    each = worker_layers // max(1, workers)
    starts = [(0, first, None), *((first + each * number, each, path) for number in range(workers))]
    return [
        MemberPlan(f"node{start}", way is None, (_share(shape, device, start, layers, streams),), way)
        for start, layers, way in starts
    ]


def _share(shape: ModelShape, device: DeviceOffer, first: int, layers: int, streams: int) -> DeviceShare:
    inside = range(first, min(first + layers, shape.layers))
    weights = sum(shape.layer_bytes[layer] for layer in inside)
    kv_bytes = 2 * sum(shape.kv_elements[layer] for layer in inside) * CONTEXT * streams
    return DeviceShare(device, first, layers, weights, kv_bytes, 0, 0)


async def measure_cpu(
    folder: Path, model: Path, shape: ModelShape, *, workers: int, worker_layers: int, streams: int, tokens: int
) -> Rates:
    """The CPU's rate in the same pool without a distance, with one stream and with ``streams``."""
    echo_ms = await measure_echo(Distance())
    async with running_pool(
        folder, model, [Distance()] * workers, worker_layers=worker_layers, streams=streams, context=CONTEXT
    ) as head:
        await head.generate(8)
        one_s = 1 / await median_rate(head, 1, tokens, 3)
        together_s = streams / await median_rate(head, streams, tokens, 3)
    path = WorkerPath(PathKind.THROUGH_US, echo_ms, protocol=PROTOCOL)
    members = members_of(shape, Rates(1e9, 0.0), workers, worker_layers, streams, path)
    one_s -= predict(shape, members, 1, tokens).round_trips_ms / 1000
    together_s -= predict(shape, members, streams, tokens).round_trips_ms / 1000
    weights = sum(shape.layer_bytes) + shape.output_bytes
    return Rates(weights / one_s, (together_s / one_s - 1) / (streams - 1) if streams > 1 else 0.0)


async def median_rate(head: Head, streams: int, tokens: int, rounds: int) -> float:
    return statistics.median([rate_of(await head.generate_together(streams, tokens)) for _ in range(rounds)])


def predict(shape: ModelShape, members: Sequence[MemberPlan], streams: int, tokens: int) -> SpeedForecast:
    filled = PROMPT_TOKENS + tokens / 2
    forecast = forecast_speed(shape, members, context=CONTEXT, parallel=streams, filled=filled)
    assert forecast is not None
    return forecast


async def compare(arguments: argparse.Namespace, folder: Path) -> list[Point]:
    shape = shape_of(arguments.layers, arguments.dim)
    model = write_tiny_model(folder / "tiny.gguf", layers=arguments.layers, dim=arguments.dim)
    most_streams = max(arguments.streams)
    print(
        f"{'workers':>7} {'round trip':>10} {'(echo)':>8} {'streams':>7} {'predicted':>9} {'measured':>8} {'error':>6}"
    )
    points = []
    for workers in arguments.workers:
        worker_layers = (shape.layers + 1) * workers // (workers + 1) // workers * workers
        rates = await measure_cpu(
            folder,
            model,
            shape,
            workers=workers,
            worker_layers=worker_layers,
            streams=most_streams,
            tokens=arguments.tokens,
        )
        print(f"CPU: {rates.bytes_per_s / 1e9:.2f} GB/s, a further token costs {rates.token_cost:.2f} of a step")
        for rtt_ms in arguments.rtt_ms:
            echo_ms = await measure_echo(Distance(rtt_ms))
            async with running_pool(
                folder,
                model,
                [Distance(rtt_ms)] * workers,
                worker_layers=worker_layers,
                streams=most_streams,
                context=CONTEXT,
                options=arguments.option,
            ) as head:
                await head.generate(8)
                for streams in arguments.streams:
                    path = WorkerPath(PathKind.THROUGH_US, echo_ms, protocol=PROTOCOL)
                    members = members_of(shape, rates, workers, worker_layers, streams, path)
                    forecast = predict(shape, members, streams, arguments.tokens)
                    predicted = forecast.tokens_per_s if streams == 1 else forecast.tokens_per_s_streams
                    measured = await median_rate(head, streams, arguments.tokens, arguments.rounds)
                    points.append(Point(workers, rtt_ms, echo_ms, streams, predicted, measured))
                    print(show(points[-1]), flush=True)
    return points


def show(point: Point) -> str:
    return (
        f"{point.workers:7} {point.rtt_ms:7.1f} ms {point.measured_rtt_ms:5.1f} ms {point.streams:7} "
        f"{point.predicted:9.2f} {point.measured:8.2f} {point.error:+6.0%}"
    )


def failures(points: Sequence[Point]) -> Iterator[str]:
    for point in points:
        if abs(point.error) > TOLERANCE:
            yield f"more than {TOLERANCE:.0%} wrong: {show(point)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", type=float, nargs="+", default=[0.2, 2.0, 20.0, 60.0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--option", action="append", default=[], help="a further option of llama-server")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        points = asyncio.run(compare(arguments, Path(folder)))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(point) for point in points], indent=1))
    problems = list(failures(points))
    if arguments.check and problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
