from __future__ import annotations

import pytest
from rich.cells import cell_len

from gpumesh.cli.views.pool.plan_view import print_plan
from gpumesh.pools.base import DeviceOffer, MemberPlan, PoolPlan
from tests.cli.views.pool import samples

WIDTHS = (60, 80, 120, 200)


def drawn(plan: PoolPlan, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    print_plan(plan)
    return capsys.readouterr().out


def test_a_plan_that_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Without the blanks: older versions of rich give the last columns of a table another width.
    lines = [" ".join(line.split()) for line in drawn(samples.plan(), 80, monkeypatch, capsys).splitlines()]
    assert [line for line in lines if line.strip("─")] == [
        "● big llama3.3:70b fits",
        "NODE DEVICE LAYERS MEMORY NEEDS MAY TAKE TO HEAD",
        "vengeance RTX 4090 ░░░░░█████ 41-80 ██████▓▒░x 21.3 GiB 22.5 GiB is head",
        "iceland RTX 4090 █████░░░░░ 0-40 ██████▓▒░x 21.8 GiB 22.5 GiB 41 ms",
        "█ weights ▓ KV cache ▒ compute ░ free x other programs",
        "model Q4_K_M, 70.6 B parameters, 80 layers, 39.6 GiB, trained for 131072",
        "tokens",
        "context 16384 tokens, 4 streams at once, KV cache q8_0",
        "load in about 6m; 20.0 GiB go to iceland, at the first time",
        "speed 11.2 tokens/s for one stream, 38.0 for 4 together",
        "of the 89 ms for a token, 48 ms are round trips",
        "19.3 tokens/s for one stream with a draft model, if 70 % of its",
        "tokens are accepted",
        "draft Llama 3.2 1B, 1.2 GiB, on the head",
        "→ one node alone, vengeance with Q2_K (23.1 GiB), would be faster: 31 tokens/s",
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_plan_that_does_not_fit_shows_what_is_missing_at_any_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = drawn(samples.unfit_plan(), width, monkeypatch, capsys)
    assert max(map(cell_len, out.splitlines())) <= width
    words = " ".join(out.split())
    assert "does not fit" in words
    assert "✗ 7.0 GiB more are needed on iceland" in words
    assert "→ `context: 8192` would fit" in words
    assert "29.5 GiB" in words
    assert "none" in words, "a node without layers"


def test_a_node_without_a_device_has_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    members = (*samples.plan().members, MemberPlan("attic", False, ()))
    out = drawn(samples.plan(members=members), 120, monkeypatch, capsys)
    (row,) = [line for line in out.splitlines() if line.startswith("attic")]
    assert "none" in row


def test_text_from_hosts_is_made_safe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\n[red]x[/red]"
    plan = samples.plan(
        model=evil,
        shape=samples.shape(file_type=evil),
        draft=samples.shape(name=evil),
        problems=(evil,),
        advice=(evil,),
        members=(MemberPlan("a", True, (samples.share(0, 81, device=DeviceOffer(evil, 0, None, samples.GIB)),)),),
    )
    out = drawn(plan, 200, monkeypatch, capsys)
    assert "\x1b" not in out
    assert "[red]" in out, "shown as it is"


def test_what_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = drawn(samples.plan(speed=None, load_s=None, sent_bytes=None, draft=None, advice=()), 120, monkeypatch, capsys)
    assert "load " not in out
    assert "speed      not known" in out
