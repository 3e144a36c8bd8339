"""The planned buffers against those that llama-server reported.

Measured on 2026-11-30 with build 10434 (commit 7e4c0a9): models of random F16 weights, the head's CPU and two
ggml-rpc-servers on loopback, `-ngl`, `-ts`, `-c`, `-np`, `-ctk`, `-ctv` as planned and `-lv 4`. All sizes are in MiB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from gpumesh.pool_spec import KvType
from gpumesh.pools.base import DeviceOffer
from gpumesh.pools.planning.memory import Load, Slot
from gpumesh.pools.planning.split import Model, Part
from tests.pools.planning.pools import MIB, llama_f16


@dataclass(frozen=True)
class Measured:
    """``counts``: the layers of the head's CPU and of both workers; the sizes are in the same order. The weights on the
    CPU are left out: llama-server reports the part of the file there that it maps."""

    case: str
    counts: tuple[int, int, int]
    weights: tuple[float, float]
    kv: tuple[float, float, float]
    compute: tuple[float, float, float]
    model: dict[str, Any] = field(default_factory=dict)
    context: int = 2048
    parallel: int = 1
    kv_type: KvType = KvType.F16


GEMMA = {"layers": 12, "windows": 256, "tied": True}
MEASURED = [
    Measured("all layers on workers", (0, 3, 6), (17.26, 32.68), (0, 3.0, 5.0), (4.01, 14.01, 14.01)),
    Measured("the first layers on the CPU", (3, 3, 3), (17.26, 15.42), (3.0, 3.0, 2.0), (15.01, 13.01, 13.01)),
    Measured("the output alone", (0, 8, 1), (46.03, 3.91), (0, 8.0, 0), (4.01, 14.01, 0.02)),
    Measured("one block and the output", (0, 7, 2), (40.28, 9.66), (0, 7.0, 1.0), (4.01, 14.01, 6.01)),
    Measured("four streams", (2, 3, 4), (17.26, 21.17), (8.0, 12.0, 12.0), (15.01, 13.01, 13.01), parallel=4),
    Measured(
        "two streams of 4096",
        (0, 3, 6),
        (17.26, 32.68),
        (0, 12.0, 20.0),
        (6.01, 16.01, 16.01),
        context=4096,
        parallel=2,
    ),
    Measured("a padded context", (2, 3, 4), (17.26, 21.17), (0.5, 0.75, 0.75), (7.92, 6.74, 6.74), context=300),
    Measured(
        "tied output, many words",
        (2, 3, 4),
        (17.26, 75.86),
        (2.0, 3.0, 3.0),
        (15.01, 13.01, 13.01),
        {"vocabulary": 60000, "tied": True},
    ),
    Measured(
        "a wide feed-forward part",
        (0, 4, 5),
        (75.33, 79.24),
        (0, 4.0, 4.0),
        (4.01, 40.17, 40.17),
        {"feed_forward": 6000},
    ),
    Measured("q8_0", (2, 3, 4), (17.26, 21.17), (1.06, 1.59, 1.59), (14.04, 13.04, 13.04), kv_type=KvType.Q8_0),
    Measured(
        "q4_0, heads of 128",
        (0, 3, 6),
        (18.01, 33.93),
        (0, 1.69, 2.81),
        (4.09, 13.09, 13.09),
        {"heads": 4},
        kv_type=KvType.Q4_0,
    ),
    Measured(
        "as many keys as heads",
        (0, 5, 4),
        (17.52, 14.42),
        (0, 20.0, 12.0),
        (4.01, 7.01, 7.01),
        {"kv_heads": 8, "feed_forward": 512},
    ),
    Measured(
        "one head of keys",
        (0, 3, 6),
        (5.64, 13.3),
        (0, 1.5, 2.5),
        (4.01, 6.01, 6.01),
        {"kv_heads": 1, "feed_forward": 256},
    ),
    Measured(
        "a norm of queries, and wide heads",
        (0, 3, 6),
        (21.01, 38.93),
        (0, 6.0, 10.0),
        (4.01, 15.01, 15.01),
        {"head_size": 128, "query_norm": True},
    ),
    Measured(
        "experts",
        (0, 3, 6),
        (39.81, 70.26),
        (0, 3.0, 5.0),
        (4.01, 11.01, 11.01),
        {"feed_forward": 512, "experts": 8, "experts_used": 2},
    ),
    Measured(
        "more experts",
        (0, 3, 6),
        (39.86, 70.33),
        (0, 3.0, 5.0),
        (4.01, 11.01, 11.01),
        {"feed_forward": 256, "experts": 16, "experts_used": 4},
    ),
    Measured("windows", (0, 4, 9), (23.03, 49.97), (0, 1.5, 6.25), (6.77, 12.76, 16.77), GEMMA, context=4096),
    Measured("windows, two streams", (0, 4, 9), (23.03, 49.97), (0, 3.0, 8.5), (4.77, 12.76, 14.77), GEMMA, parallel=2),
]


@pytest.mark.parametrize("measured", MEASURED, ids=lambda measured: measured.case)
def test_buffers_are_as_measured(measured: Measured) -> None:
    load = Load(measured.context, measured.parallel, measured.kv_type)
    model = Model.of(llama_f16(**measured.model), load)
    device = DeviceOffer("CPU", None, None, 0)
    weights, kv, compute = [], [], []
    first = 0
    for node, count in zip(("head", "one", "two"), measured.counts, strict=True):
        part = Part(Slot(node, node == "head", device, 0), first, count)
        needs = model.needs[first : first + count]
        weights.append(sum(need.weights for need in needs) / MIB)
        kv.append(sum(need.kv for need in needs) / MIB)
        compute.append(model.compute_bytes(part, measured.counts[0]) / MIB)
        first += count
    assert first == len(model.needs)
    assert weights[1:] == pytest.approx(measured.weights, rel=0.01)
    assert kv == pytest.approx(measured.kv, rel=0.01, abs=0.01)
    assert compute == pytest.approx(measured.compute, rel=0.01, abs=0.01)
