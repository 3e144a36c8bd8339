from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from gpumesh.balancer.outcomes import Outcome
from gpumesh.gateway.observe import gauges
from gpumesh.gateway.observe.exposition import render
from gpumesh.state import GpuState, MeshGatewayState
from tests.cli import states
from tests.gateway.fleet import metric

ATTEMPTS = {"iceland": Counter({Outcome.SERVED: 120, Outcome.CUT: 2}), "runpod": Counter[Outcome]()}
MIB = 1 << 20


def test_the_metrics_of_a_fleet() -> None:
    text = render(gauges.mesh_families(states.typical(), ATTEMPTS))

    def of(name: str, node: str, **more: str) -> float:
        return metric(text, f"gpumesh_{name}", node=node, **more)

    assert [of("node_up", name) for name in ("iceland", "vengeance", "runpod", "attic")] == [1, 1, 0, 0]
    assert of("node_draining", "attic") == 1
    assert of("tunnel_up", "iceland", transport="sshtunnel") == 1
    assert of("tunnel_up", "runpod") == 0
    assert of("tunnel_round_trip_seconds", "iceland") == 0.0412
    assert of("tunnel_reconnects_total", "iceland") == 1
    assert of("backend_up", "iceland", kind="ollama") == 1
    assert of("model_loaded_bytes", "iceland", model="qwen2.5:7b") == 5120 * MIB
    assert of("gpu_memory_used_bytes", "iceland", gpu="0") == 5632 * MIB
    assert of("gpu_memory_total_bytes", "iceland") == 24564 * MIB
    assert of("gpu_utilization_ratio", "iceland") == 0.42
    assert of("gpu_temperature_celsius", "iceland") == 61
    assert of("gpu_power_watts", "iceland") == 212.5
    assert of("gpu_power_limit_watts", "iceland") == 450
    assert of("attempts_total", "iceland", outcome="served") == 120
    assert of("attempts_total", "iceland", outcome="cut") == 2
    assert of("finding", "vengeance", code="gpu-missing", severity="warning") == 1
    assert metric(text, "gpumesh_requests_in_flight") == 1
    assert "\ngpumesh_gateways" not in text


def test_the_gateways_that_share_the_nodes_are_counted() -> None:
    gateway = MeshGatewayState("a" * 16, "laptop", 1, "1", states.AT, 0, 0)
    state = replace(states.typical(), gateways=(gateway, gateway))
    assert metric(render(gauges.mesh_families(state, {})), "gpumesh_gateways") == 2


def test_an_unknown_value_has_no_sample() -> None:
    text = render(gauges.mesh_families(states.typical(), {}))
    samples = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("node") == "runpod"
    ]
    assert {sample.name for sample in samples} == {
        "gpumesh_node_up",
        "gpumesh_node_draining",
        "gpumesh_node_requests_in_flight",
        "gpumesh_tunnel_up",
        "gpumesh_tunnel_reconnects_total",
        "gpumesh_backend_up",
    }
    assert {sample.value for sample in samples} == {0.0}


def test_no_series_stands_twice_and_no_name_breaks_the_format() -> None:
    odd = GpuState(0, "GPU-1", 'RTX "4090"\\\n# HELP evil', memory_total_mib=1)
    node = states.healthy("iceland", gpus=(odd, odd))
    text = render(gauges.mesh_families(states.mesh(node), ATTEMPTS))
    names = [
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    assert len(names) == len(set(names))
    assert "\n# HELP evil" not in text


def test_the_metrics_of_this_process() -> None:
    text = render(gauges.process_families())
    assert metric(text, "process_cpu_seconds_total") > 0
    assert 1 << 20 < metric(text, "process_resident_memory_bytes") < 1 << 40
    assert 3 <= metric(text, "process_open_fds") <= metric(text, "process_max_fds")
    assert os.path.exists("/proc/self/fd"), "on Linux"


def test_the_metrics_of_the_server() -> None:
    text = render(gauges.server_families(3, 7, 2))
    assert metric(text, "gpumesh_client_connections") == 3
    assert metric(text, "gpumesh_client_connections_refused_total") == 7
    assert metric(text, "gpumesh_client_connections_closed_for_others_total") == 2
