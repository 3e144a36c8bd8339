"""What a draft model gains over a distance, where its acceptance is known: the draft model is the model itself.

    python benchmarks/pool_draft.py [--rtt-ms MS ...] [--length N ...] [--tokens N] [--rounds N] [--check]

Greedy decoding takes over every token of it (acceptance 1). The draft is kept on the head's CPU. The forecast knows the
same as in pool_speed.py. ``--check`` exits 1 unless each rate, and each gain over no draft, is within 25 %.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from pool_lab import Distance, measure_echo, running_pool
from pool_speed import CONTEXT, PROMPT_TOKENS, PROTOCOL, TOLERANCE, measure_cpu, median_rate, members_of, shape_of

from gpumesh.pools.base import PathKind, WorkerPath
from gpumesh.pools.planning.speed import forecast_speed
from tests.real.tiny_model import write_tiny_model

WORKER_LAYERS = 4


async def compare(arguments: argparse.Namespace, folder: Path) -> list[str]:
    shape = shape_of(arguments.layers, arguments.dim)
    model = write_tiny_model(folder / "tiny.gguf", layers=arguments.layers, dim=arguments.dim)
    rates = await measure_cpu(
        folder, model, shape, workers=1, worker_layers=WORKER_LAYERS, streams=4, tokens=arguments.tokens
    )
    problems = []
    print("round trip length accepted predicted measured  gain: predicted measured")
    for rtt_ms in arguments.rtt_ms:
        path = WorkerPath(PathKind.THROUGH_US, await measure_echo(Distance(rtt_ms)), protocol=PROTOCOL)
        members = members_of(shape, rates, 1, WORKER_LAYERS, 1, path)
        plain_predicted = plain_measured = 0.0
        for length in (0, *arguments.length):
            options = ["-md", str(model), "--spec-type", "draft-simple", "--spec-draft-device", "none"]
            options += ["--spec-draft-n-max", str(length)]
            forecast = forecast_speed(
                shape,
                members,
                context=CONTEXT,
                parallel=1,
                filled=PROMPT_TOKENS + arguments.tokens / 2,
                draft=shape if length else None,
                draft_acceptance=1.0,
                draft_length=length,
            )
            assert forecast is not None
            async with running_pool(
                folder,
                model,
                [Distance(rtt_ms)],
                worker_layers=WORKER_LAYERS,
                context=CONTEXT,
                options=options if length else [],
            ) as head:
                await head.generate(8)
                measured = await median_rate(head, 1, arguments.tokens, arguments.rounds)
                metrics = await head.metrics()
            predicted = forecast.draft_tokens_per_s or forecast.tokens_per_s
            drafted = metrics["llamacpp:spec_decode_num_draft_tokens_total"]
            accepted = metrics["llamacpp:spec_decode_num_accepted_tokens_total"] / drafted if drafted else 0.0
            if not length:
                plain_predicted, plain_measured = predicted, measured
            gains = predicted / plain_predicted, measured / plain_measured
            line = f"{rtt_ms:7.1f} ms {length:6} {accepted:8.2f} {predicted:9.2f} {measured:8.2f} "
            line += f"{gains[0]:14.2f} {gains[1]:8.2f}"
            print(line, flush=True)
            if max(abs(predicted / measured - 1), abs(gains[0] / gains[1] - 1)) > TOLERANCE:
                problems.append(line)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", type=float, nargs="+", default=[2.0, 20.0, 60.0])
    parser.add_argument("--length", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problems = asyncio.run(compare(arguments, Path(folder)))
    if arguments.check and problems:
        sys.exit("\n".join([f"more than {TOLERANCE:.0%} wrong:", *problems]))


if __name__ == "__main__":
    main()
