"""Small fleets and requests for the tests of the simulator: figures that can be calculated by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from gpumesh.bench.simulate.fleet import ModelSpec, NodeSpec
from gpumesh.bench.simulate.measures import Measures
from gpumesh.bench.simulate.requests import SimulatedRequest
from gpumesh.bench.simulate.simulation import Simulation

MODEL = ModelSpec("m:latest", tokens_per_s=100.0, prefill_tokens_per_s=1000.0, load_s=4.0, vram_mib=5000.0, slots=2)
OTHER = replace(MODEL, name="other:latest")


def node(name: str = "a", *, models: Iterable[ModelSpec] = (MODEL,), **changes: Any) -> NodeSpec:
    """A node with ``MODEL`` in memory, whose streams do not slow each other down unless ``changes`` say so."""
    by_name = {model.name: model for model in models}
    values: dict[str, Any] = {"loaded": (MODEL.name,), "share": 0.0, "prefill_stall": 0.0, "prefill_lanes": 100}
    return NodeSpec(name, by_name, **{**values, **changes})


def request(
    number: int, at_s: float = 0.0, *, prompt: int = 100, tokens: int = 100, **changes: Any
) -> SimulatedRequest:
    """A request that alone takes 0.1 s of reading and 1 s of generating."""
    return SimulatedRequest(
        number, at_s, **{"model": MODEL.name, "prompt_tokens": prompt, "output_tokens": tokens, **changes}
    )


def simulate(nodes: list[NodeSpec], requests: Iterable[SimulatedRequest], policy: str = "round-robin") -> Measures:
    return Simulation(nodes, requests, policy).run()
