"""What a real gateway counts of requests in every dialect, of those that move, and of those that are continued."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from gpumesh.gateway.observe.metrics import RequestMetrics
from gpumesh.gateway.usage.counts import UsageCounts
from gpumesh.gateway.usage.recorder import UsageRecorder
from gpumesh.gateway.usage.store import KEPT_DAYS, UsageStore, read_rows
from gpumesh.lab.profile import EMBEDDER, QWEN_7B, Faults
from gpumesh.topology import GatewaySpec, KeySpec
from tests.gateway.fleet import MODEL, RunningGateway, events, lines, quick_host, serve_hosts

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
ON_A = {"X-GPUMesh-Node": "a"}


@asynccontextmanager
async def serve_counted(tmp_path: Path, **more: Any) -> AsyncIterator[tuple[RunningGateway, Path]]:
    """A gateway over two hosts with a store. ``b`` is used when ``a`` cannot be."""
    path = tmp_path / "u.sqlite"
    hosts = (quick_host("a", models=(QWEN_7B, EMBEDDER)), quick_host("b", models=(QWEN_7B,)))
    async with serve_hosts(*hosts, usage_store=UsageStore(path), **more) as running:
        yield running, path


def counts_of(running: RunningGateway, path: Path, *names: str) -> dict[tuple[str, ...], UsageCounts]:
    running.gateway.usage.flush()
    return dict(read_rows(path, names, since="2026-01-01"))


async def test_tokens_that_no_server_counts_are_those_of_the_stream(tmp_path: Path) -> None:
    async with serve_counted(tmp_path) as (running, path):
        answer = await running.client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        deltas = [event["choices"][0]["delta"] for event in events(answer.text) if event != "[DONE]"]
        assert not any("usage" in event for event in events(answer.text) if event != "[DONE]")
        embedding = (await running.client.post("/api/embed", json={"model": EMBEDDER.name, "input": "hello"})).json()
        (await running.client.post("/api/show", json={"model": MODEL})).raise_for_status()
        counts = counts_of(running, path, "model")
    chat, embed = counts[MODEL,], counts[EMBEDDER.name,]
    assert (chat.requests, chat.estimated, embed.requests, embed.estimated) == (1, 1, 1, 0)
    assert chat.answer_tokens == sum(bool(delta.get("content")) for delta in deltas)
    assert chat.prompt_tokens > 0
    assert (embed.prompt_tokens, embed.answer_tokens) == (embedding["prompt_eval_count"], 0)
    assert len(counts) == 2, "a question about a model uses nothing"


async def test_a_request_that_moves_counts_where_it_was_answered(
    tmp_path: Path,
) -> None:
    async with serve_counted(tmp_path, max_parallel=1) as (running, path):
        await running.hosts["b"].set_faults(Faults(status=500, times=1))
        await running.hosts["a"].set_faults(Faults(status=500, times=1))
        answers = [(await running.chat()) for _ in range(3)]
        assert {answer.status_code for answer in answers} <= {200, 500}
        counts = counts_of(running, path, "node")
    assert sum(node.requests for node in counts.values()) == len(answers)
    assert sum(node.failed for node in counts.values()) == sum(answer.status_code == 500 for answer in answers)
    tokens = [answer.json()["eval_count"] for answer in answers if answer.status_code == 200]
    assert sum(node.answer_tokens for node in counts.values()) == sum(tokens)
    assert all(node.gpu_s > 0.0 for node in counts.values())


async def test_a_continued_answer_counts_once_as_its_client_has_seen_it(tmp_path: Path) -> None:
    async with serve_counted(tmp_path) as (running, path):
        for host in running.hosts.values():
            await host.set_faults(Faults(cut_after_tokens=3, times=1, paths=("/api/chat",)))
        answer = await running.client.post("/api/chat", json=CHAT)
        final = lines(answer.text)[-1]
        assert final["done"] is True
        assert len(lines(answer.text)) > 4
        counts = counts_of(running, path, "node")
        generated = {name: host.counters.tokens for name, host in running.hosts.items()}
    assert sum(node.requests for node in counts.values()) == 1
    assert sum(node.answer_tokens for node in counts.values()) == final["eval_count"]
    assert sum(node.prompt_tokens for node in counts.values()) == final["prompt_eval_count"]
    assert sum(node.estimated for node in counts.values()) == 0
    assert all(counts[name,].gpu_s > 0.0 for name, tokens in generated.items() if tokens), "each node's own time"


async def test_the_route_tells_a_limited_key_its_own_usage_only(tmp_path: Path) -> None:
    keys = tuple(
        KeySpec(name, sha256=hashlib.sha256(name.encode()).hexdigest(), tokens_per_month=limit)
        for name, limit in (("limited", 1000), ("other", None))
    )
    async with serve_counted(tmp_path, spec=GatewaySpec(keys=keys)) as (running, _):

        async def ask(name: str, query: str = "") -> Any:
            return (await running.client.get(f"/mesh/usage{query}", headers={"x-api-key": name})).json()

        for name in ("limited", "other", "other"):
            assert (await running.chat(headers={"x-api-key": name})).status_code == 200
        all_rows = {row["key"]: row["requests"] for row in (await ask("other"))["rows"]}
        assert all_rows == {"limited": 1, "other": 2}
        own = await ask("limited", "?by=model&by=key&since=1d")
        assert [(row["model"], row["key"], row["requests"]) for row in own["rows"]] == [(MODEL, "limited", 1)]
        assert [budget["key"] for budget in own["budgets"]] == ["limited"]
        assert "by is one of key, model, node, day" in (await ask("other", "?by=user"))["error"]
        assert "since is neither" in (await ask("other", "?since=soon"))["error"]
        assert (await running.client.get("/mesh/usage")).status_code == 401


async def test_old_days_are_removed_at_the_start(tmp_path: Path) -> None:
    async with serve_counted(tmp_path) as (running, path):
        await running.chat()
    for days, kept in ((KEPT_DAYS - 1, 1), (KEPT_DAYS + 1, 0)):
        later = (datetime.now(UTC) + timedelta(days=days)).timestamp()
        recorder = UsageRecorder(
            UsageStore(path), find_label=RequestMetrics().model_label, wall_clock=repeat(later).__next__
        )
        recorder.close()
        assert len(read_rows(path, ("day",), since="2026-01-01")) == kept


async def test_a_full_disk_fails_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve_counted(tmp_path) as (running, path):
        with monkeypatch.context() as patch:
            patch.setattr("gpumesh.gateway.usage.journal.os.write", lambda *_: 0)
            for _ in range(2):
                assert (await running.chat()).status_code == 200
                running.gateway.usage.flush()
        assert caplog.text.count("usage cannot be written") == 1
        assert counts_of(running, path, "key") == {}
    assert read_rows(path, ("key",), since="2026-01-01")[("",)].requests == 2, "they were kept in memory"
