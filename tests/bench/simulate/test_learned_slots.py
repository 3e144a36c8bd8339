"""The slots of a server are found by its answers, also where these are shorter than the way to the server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.bench.simulate.simulation import Simulation
from gpumesh.bench.simulate.workloads import Mix, Workload
from tests.bench.simulate.build import MODEL, node


def seconds_for_a_batch(slots: int, *, answer_tokens: float, rtt_s: float, is_told: bool) -> float:
    """How long a batch takes on one node. ``is_told``: mesh.yaml says how many slots it has."""
    model = replace(MODEL, slots=slots)
    requests = 3000 if slots > 16 else 1000  # few slots are soon found
    spec = node(
        models=(model,),
        share=0.05,
        prefill_lanes=slots,
        rtt_s=rtt_s,
        max_parallel=slots if is_told else None,
    )
    batch = Workload(Mix((MODEL.name,), (1.0,)), 0, batch=requests, prompt_tokens=20.0, output_tokens=answer_tokens)
    return Simulation([spec], batch, "adaptive", max_queue=requests).run().result().makespan_s


@pytest.mark.parametrize("rtt_s", [0.001, 0.04])
@pytest.mark.parametrize("answer_tokens", [1.0, 3.0, 20.0])
@pytest.mark.parametrize("slots", [4, 16, 64])
def test_a_batch_takes_hardly_longer_than_if_the_slots_were_known(
    slots: int, answer_tokens: float, rtt_s: float
) -> None:
    """Three seconds more: 64 slots are found in about 40 times of the way and an answer."""
    learned_s = seconds_for_a_batch(slots, answer_tokens=answer_tokens, rtt_s=rtt_s, is_told=False)
    known_s = seconds_for_a_batch(slots, answer_tokens=answer_tokens, rtt_s=rtt_s, is_told=True)
    assert learned_s <= 1.1 * known_s + 3.0
