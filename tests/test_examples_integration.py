"""Examples that wire the mesh into something else: programs, Grafana."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.outcomes import Outcome
from gpumesh.gateway.observe import gauges
from gpumesh.gateway.observe.forecast_metrics import forecast_families
from gpumesh.gateway.observe.metrics import RequestMetrics
from gpumesh.lab import profile
from gpumesh.lab.lab import Lab
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.mesh.nodes.forecast_record import ForecastRecord
from tests.cli import states
from tests.gateway.fleet import MODEL, quick_host, serve_hosts
from tests.gateway.observe.test_metrics import Streamed, record
from tests.test_examples import EXAMPLES, run, script

# -- programs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_library(tmp_path: Path) -> None:
    """Over a lab, through tunnels; and by itself, over a lab of its own."""
    async with Lab((profile.make_host("one", load_s=0.1), profile.make_host("two", load_s=0.1)), tmp_path) as lab:
        file = lab.write_config(tmp_path / "mesh.yaml")
        code, out, err = await run(sys.executable, str(EXAMPLES / "library.py"), str(file), MODEL)
    assert code == 0, err
    lines = out.splitlines()
    assert "one: healthy, NVIDIA GeForce RTX 4090, models: qwen2.5:7b" in lines
    assert re.search(r"^\((one|two), \d+ tokens/s\)$", out, re.MULTILINE)
    assert [line[:2].strip() for line in lines if " by " in line[:8]] == [str(number) for number in range(8)]
    assert lines[-1].startswith("ModelMissing: no node that is up has the model 'no-such-model'; there are: qwen2.5:7b")
    alone, out, err = await run(sys.executable, str(EXAMPLES / "library.py"))
    assert alone == 0, err
    assert "reykjavik: healthy" in out


async def test_fastapi_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SimOllama(quick_host("one")) as host:
        file = tmp_path / "mesh.yaml"
        file.write_text(json.dumps({"nodes": [{"name": "one", "backend": {"url": host.url}}]}))
        monkeypatch.setenv("GPUMESH_CONFIG", str(file))
        app = script("fastapi_backend").app
        async with app.router.lifespan_context(app):
            await app.state.mesh.wait_first_report(10)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://backend") as client:
                answer = await client.post("/answer", json={"question": "Why?", "user": "ada"})
                assert (answer.status_code, answer.headers["X-Node"]) == (200, "one")
                assert answer.text.strip()
                (node,) = (await client.get("/gpus")).json()
                assert (node["node"], node["health"] in ("healthy", "degraded")) == ("one", True)
                stored = host.engine.store.pop(MODEL)
                await app.state.mesh.refresh(["one"])
                missing = await client.post("/answer", json={"question": "Why?"})
                assert missing.status_code == 404
                assert "could be pulled to one" in missing.json()["detail"]
                host.engine.store[MODEL] = stored
                await app.state.mesh.refresh(["one"])
                await host.set_faults(Faults(end_after_tokens=2, paths=("/api",)))
                broken = await client.post("/answer", json={"question": "Why?"})
                assert "[the answer broke off" in broken.text


# -- Grafana ---------------------------------------------------------------------------------------------------------


def expressions() -> Iterator[tuple[str, str]]:
    dashboard: dict[str, Any] = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


def everything() -> dict[str, set[str]]:
    """Each metric's names with the labels that they have, of a fleet that has seen everything."""
    metrics = RequestMetrics()
    answer = Streamed(ServerCounters(prompt_tokens=3, tokens=5))
    answer.continuations = 1
    metrics.add(record(answer))
    attempts = {"iceland": {Outcome.SERVED: 1}}
    forecasts = ForecastRecord()
    forecasts.loads = forecasts.pushed_out = {MODEL: 1}
    families = [
        *gauges.mesh_families(states.typical(), attempts),
        *gauges.server_families(1, 0, 0),
        *metrics.families(),
        *forecast_families({"iceland": forecasts}),
        *gauges.process_families(),
    ]
    return {
        f"{family.name}{sample.suffix}": {name for name, _ in sample.labels}
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_grafana_asks_for_what_there_is(title: str, expression: str) -> None:
    there = everything()
    asked = set(re.findall(r"\b(?:gpumesh|process)_\w+", expression))
    assert asked, title
    assert asked <= there.keys(), f"{title}: {asked - there.keys()}"
    # Prometheus adds job and instance; le is a bucket's.
    labels = set(re.findall(r"(\w+)=~?\"|(\w+)!=\"", expression))
    named = {one or other for one, other in labels} | {
        label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")
    }
    known = set().union(*(there[name] for name in asked)) | {"job", "instance"}
    assert named <= known, f"{title}: {named - known}"


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((EXAMPLES / "grafana-dashboard.json").read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


async def test_metrics_of_a_gateway_are_those_of_the_dashboard() -> None:
    """By a real page, apart from what only GPUs and tunnels have."""
    async with serve_hosts() as fleet:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        await asyncio.gather(*(fleet.client.post("/api/chat", json=body) for _ in range(3)))
        await fleet.mesh.refresh(["a", "b"])  # what is loaded is seen by the probes
        text = (await fleet.client.get("/metrics")).text
    asked = {name for _, expression in expressions() for name in re.findall(r"\bgpumesh_\w+", expression)}
    here = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}
    assert {name for name in asked - here if "_gpu_" not in name} == {
        "gpumesh_continuations_total",
        "gpumesh_models_pushed_out_total",
    }
