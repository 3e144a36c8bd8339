from __future__ import annotations

import io
from dataclasses import replace
from datetime import timedelta

import pytest
from rich.cells import cell_len
from rich.console import Console

from gpumesh.cli.views.status_table import NO_GPU_REASONS, ViewOptions, bar_text, print_status, status_view
from gpumesh.cli.views.tables import render_lines
from gpumesh.mesh.history import History, HistorySeries
from gpumesh.state import (
    Finding,
    GatewayState,
    GpuState,
    Health,
    LoadedModel,
    MeshState,
    ModelInfo,
    NodeState,
    ProcessState,
    Severity,
    TunnelPhase,
)
from tests.cli.states import AT, down, gpu, healthy, mesh, typical

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202e[bold]"


def drawn(state: MeshState, width: int, look: ViewOptions | None = None) -> list[str]:
    out = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    return render_lines(out, status_view(state, width, look or ViewOptions()))


def text(state: MeshState, width: int = 200, look: ViewOptions | None = None) -> str:
    return "\n".join(drawn(state, width, look))


def row_of(node: str, state: MeshState, width: int = 200) -> str:
    return next(line for line in drawn(state, width)[3:] if line[2:].startswith(f"{node} "))


# -- how wide it is --------------------------------------------------------------------------------------------------

TITLES = {
    60: "NODE HEALTH MEMORY GiB UTIL BUSY",
    80: "NODE HEALTH GPU MEMORY GiB UTIL BUSY",
    120: "NODE HEALTH GPU MEMORY GiB UTIL TEMP LOADED TOK/S BUSY RTT",
    200: "NODE HEALTH GPU MEMORY GiB UTIL TEMP POWER LOADED TOK/S BUSY RTT TUNNEL BACKEND SERVED",
}


@pytest.mark.parametrize("width", TITLES)
def test_each_width_has_the_columns_that_fit(width: int) -> None:
    shown = drawn(typical(), width)
    assert " ".join(shown[1].split()) == TITLES[width]
    assert max(map(cell_len, shown)) <= width


@pytest.mark.parametrize("width", range(8, 260, 7))
def test_nothing_is_wider_than_the_screen_and_no_node_is_missing(width: int) -> None:
    shown = drawn(typical(), width)
    assert max(map(cell_len, shown)) <= width
    table = "\n".join(shown)
    for node in typical().nodes:
        assert node.name[: max(min(width - 4, 10), 1)] in table


def test_columns_stand_under_their_titles() -> None:
    shown = drawn(typical(), 200)
    for title, value in (("BUSY", "1/1 +2"), ("RTT", "41 ms"), ("TEMP", "61°"), ("POWER", "212/450 W")):
        end = shown[1].index(title) + len(title)
        assert shown[3][:end].endswith(value), title


# -- what it says ----------------------------------------------------------------------------------------------------


def test_a_node_that_works() -> None:
    row = row_of("iceland", typical())
    for part in ("● iceland", "healthy", "RTX 4090", "5.5/24.0", "42%", "61°", "212/450 W", "qwen2.5:7b 4m", "73",
                 "1/1 +2", "41 ms", "sshtunnel up 4m ↻1", "ollama 0.12.6", "120"):  # fmt: skip
        assert part in row, part


def test_what_is_not_known_is_a_dash_and_never_zero() -> None:
    row = row_of("runpod", typical())
    assert "0.0" not in row
    assert "%" not in row
    assert row.split()[:4] == ["✗", "runpod", "down", "–"]  # noqa: RUF001


def test_a_reason_once_with_what_to_do() -> None:
    shown = text(typical())
    assert shown.count("nothing listens on 203.0.113.7:22") == 1
    assert "✗ runpod down: nothing listens on 203.0.113.7:22 (again in 4s)\n  → is the pod running?" in shown
    assert "! vengeance gpu-missing: mesh.yaml expects 3 GPUs, 2 are there\n  → if that is right" in shown


def test_the_reason_of_a_node_that_is_up_has_the_hint_of_its_finding() -> None:
    message = "the NVIDIA driver does not answer"
    node = replace(healthy("a"), health=Health.DEGRADED, reason=message, gpus=None)
    found = Finding("driver-broken", Severity.ERROR, "a", message, "modprobe nvidia")
    shown = text(mesh(node, findings=(found,)))
    assert shown.count(message) == 1
    assert "→ modprobe nvidia" in shown


def test_several_gpus_of_a_host_are_told_apart() -> None:
    state = mesh(healthy("v", gpus=(gpu(0), gpu(1, name="NVIDIA H100 80GB HBM3", busy=3))))
    rows = [line for line in drawn(state, 160) if "RTX 4090" in line or "H100" in line]
    assert "0 RTX 4090" in rows[0]
    assert "1 H100 80GB HBM3" in rows[1]
    assert rows[1].startswith("   ")
    assert "healthy" not in rows[1]


@pytest.mark.parametrize(("code", "words"), NO_GPU_REASONS.items())
def test_why_gpus_are_not_shown(code: str, words: str) -> None:
    node = replace(healthy("a"), health=Health.DEGRADED, reason="x", gpus=None)
    found = Finding(code, Severity.ERROR, "a", "something")
    assert words in row_of("a", mesh(node, findings=(found,)), 120)


def test_one_lost_gpu_beside_others_that_answer() -> None:
    found = Finding("gpu-lost", Severity.ERROR, "v", "a GPU has fallen off the bus")
    shown = drawn(mesh(healthy("v", gpus=(gpu(0), gpu(2, busy=3))), findings=(found,)), 120)
    rows = shown[3:6]
    assert "0 RTX 4090" in rows[0]
    assert "2 RTX 4090" in rows[1]
    assert rows[2].strip() == "GPU lost"


def test_no_gpus_and_a_slice_of_one() -> None:
    assert " none " in row_of("a", mesh(healthy("a", gpus=()), healthy("b")))
    part = replace(gpu(), uuid="MIG-1234", name="NVIDIA H100 80GB HBM3", utilization_pct=None)
    row = row_of("a", mesh(healthy("a", gpus=(part,)), healthy("b")))
    assert "MIG H100 80GB HBM3" in row
    part = replace(part, name="NVIDIA A100-SXM4-80GB MIG 1g.10gb")
    assert "MIG 1g.10g" in row_of("a", mesh(healthy("a", gpus=(part, part)), healthy("b")), 80), "not only the card"


def test_on_a_wide_screen_no_name_is_cut_for_the_sake_of_lesser_columns() -> None:
    long = healthy("a-node-with-a-long-name", gpus=(replace(gpu(), name="NVIDIA RTX PRO 6000 Blackwell Server"),))
    state = mesh(*typical().nodes, long)
    row = row_of("a-node-with-a-long-name", state, 200)
    assert "RTX PRO 6000 Blackwell Server" in row


def test_models_in_memory() -> None:
    def loaded(*models: LoadedModel) -> str:
        node = healthy("a")
        return row_of("a", mesh(replace(node, backend=replace(node.backend, loaded=models))), 250)

    soon = AT + timedelta(seconds=30)
    assert "m:7b 30s " in loaded(LoadedModel("m:7b", 5, 5, soon))
    assert "m:7b ∞ " in loaded(LoadedModel("m:7b", 5, 5, AT + timedelta(days=40_000)))
    assert "m:7b (40% CPU) 30s" in loaded(LoadedModel("m:7b", 60, 100, soon))
    assert " Llama-3.3-70B:Q4_K_M 30s " in loaded(LoadedModel("hf.co/bartowski/Llama-3.3-70B:Q4_K_M", 5, 5, soon))
    assert "a, b +2" in loaded(*(LoadedModel(name) for name in "abcd"))
    assert "(2 on disk)" in loaded()


def test_the_last_minute() -> None:
    history = History(gpus=(HistorySeries(gpu().uuid, (None, None, 0.0, 50.0, 100.0)),))
    shown = drawn(mesh(healthy("a")), 200, ViewOptions(history=history))
    assert "LAST MIN" in shown[1]
    assert "  ▁▅█ " in shown[3]
    assert "LAST MIN" not in text(mesh(healthy("a")))


def test_the_pool_in_one_line() -> None:
    shown = text(typical(), 160)
    line = "2 of 4 nodes up · 3 GPUs · 21.6 of 72.0 GiB free · 154 tok/s · 1 in flight"
    assert f"{line} · a 14B Q4 fits on 1 node, a 3B on 2\n" in shown
    queued = replace(typical(), gateway=GatewayState(in_flight=2, queued=7))
    assert "2 in flight · 7 queued" in text(queued)
    assert "1 of 1 node up · 1 GPU ·" in text(mesh(healthy("a")))


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_of_the_pool_only_whole_parts_are_shown(width: int) -> None:
    (line,) = [line for line in drawn(typical(), width) if "nodes up" in line]
    assert "…" not in line
    assert cell_len(line) <= width


def test_processes_the_largest_first() -> None:
    procs = (ProcessState(1, "small", 10), ProcessState(2, "of unknown size"), ProcessState(3, "large", 9000))
    state = mesh(healthy("a", gpus=(replace(gpu(), processes=procs),)))
    shown = drawn(state, 120, ViewOptions(verbose=True))
    rows = [line.split() for line in shown[shown.index(next(line for line in shown if "PID" in line)) + 2 :]]
    assert [row[2] for row in rows] == ["3", "1", "2"]
    assert rows[0][3:] == ["9000", "large"]
    assert "no process is seen" in text(mesh(healthy("a", gpus=())), 120, ViewOptions(verbose=True))


def test_simulated_hosts_are_said_to_be() -> None:
    assert "simulated hosts" in text(mesh(replace(healthy("a"), simulated=True)))
    assert "simulated" not in text(mesh(healthy("a")))


# -- screens that cannot scroll --------------------------------------------------------------------------------------


def many(count: int) -> MeshState:
    nodes = [healthy(f"node-{number:03d}") for number in range(count)]
    nodes[count - 1] = down(f"node-{count - 1:03d}")
    return mesh(*nodes)


@pytest.mark.parametrize("height", [6, 10, 24, 50])
def test_it_is_no_higher_than_the_screen_and_shows_what_is_wrong(height: int) -> None:
    shown = drawn(many(100), 120, ViewOptions(height=height))
    assert len(shown) <= max(height, 9)
    assert any(line.startswith("✗ node-099") for line in shown)
    assert any("more rows" in line for line in shown)


def test_what_is_the_same_for_many_nodes_is_said_once() -> None:
    nodes = [healthy(f"n{number}", gpus=None) for number in range(100)]
    missing = Finding("nvidia-smi-missing", Severity.INFO, None, "nvidia-smi is on no usual path", "install it")
    findings = [replace(missing, node=node.name) for node in nodes]
    other = replace(missing, node="n7", message="something else")
    shown = text(mesh(*nodes, findings=(*findings, other)), 120)
    assert shown.count("nvidia-smi is on no usual path") == 1
    assert "i n0, n1, n2, n3 and 96 more nvidia-smi-missing: nvidia-smi is on no usual path" in shown
    assert "i n7 nvidia-smi-missing: something else" in shown
    assert shown.count("install it") == 2
    assert "i n0, n1 nvidia" in text(mesh(*nodes, findings=tuple(findings[:2])), 120)
    assert "i n1 nvidia" in text(mesh(*nodes, findings=(findings[1],)), 120)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("height", [20, 30, 40])
def test_remarks_that_take_several_lines_are_counted_so_and_not_cut_off(width: int, height: int) -> None:
    long = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver; " * 2
    nodes = [replace(healthy(f"node-{number:03d}"), health=Health.DEGRADED, reason=long) for number in range(20)]
    shown = drawn(mesh(*nodes), width, ViewOptions(height=height))
    assert len(shown) <= height
    assert shown[-1].startswith("… ")
    assert "remarks: `gpumesh" in shown[-1]
    assert sum(line.startswith("◐ node-") for line in shown) > 3, "the nodes have their rows"


def test_there_is_nothing_more_to_say_when_all_is_said() -> None:
    assert "remark" not in text(mesh(down("a"), healthy("b")), 80, ViewOptions(height=40))
    assert "remark" not in text(mesh(*(down(f"n{number}") for number in range(30))), 80), "it scrolls"


def test_it_is_scrolled_to_what_is_selected() -> None:
    shown = "\n".join(drawn(many(100), 120, ViewOptions(height=24, selected="node-050")))
    assert "node-050" in shown
    assert "node-045" in shown
    assert "node-001" not in shown


def test_what_fits_is_shown_whole() -> None:
    assert "more rows" not in text(many(10), 120, ViewOptions(height=30))


# -- hostile words ---------------------------------------------------------------------------------------------------


def hostile(node: NodeState) -> NodeState:
    card = GpuState(0, HOSTILE, HOSTILE, 24564, 1, 2, processes=(ProcessState(1, HOSTILE, 1),))
    backend = replace(
        node.backend,
        kind=HOSTILE,
        version=HOSTILE,
        models=(HOSTILE,),
        loaded=(LoadedModel(HOSTILE, 1, 2, AT),),
        catalog=(ModelInfo(HOSTILE, HOSTILE),),
    )
    tunnel = replace(node.tunnel, transport=HOSTILE, state=TunnelPhase.BACKOFF, hint=HOSTILE, last_error=HOSTILE)
    return replace(node, name=HOSTILE, health=Health.DOWN, reason=HOSTILE, gpus=(card,), backend=backend, tunnel=tunnel)


@pytest.mark.parametrize("width", [60, 80, 120, 200, 400])
def test_nothing_that_a_host_says_reaches_the_terminal_as_it_is(width: int) -> None:
    found = Finding(HOSTILE, Severity.ERROR, HOSTILE, HOSTILE, HOSTILE, (HOSTILE,))
    state = replace(mesh(hostile(healthy("a")), findings=(found,)), mesh=HOSTILE)
    state = replace(state, gateway=GatewayState(HOSTILE))
    shown = text(state, width, ViewOptions(verbose=True))
    assert "red[bold]" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


# -- bars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "bar"),
    [(None, "░░░░"), (0.0, "░░░░"), (0.005, "░░░░"), (0.01, "█░░░"), (0.5, "██░░"), (0.99, "████"), (7.0, "████")],
)
def test_bars(part: float | None, bar: str) -> None:
    assert bar_text(part, 4, 0.1, 0.8).plain == bar


def test_bars_have_the_colours_that_people_know() -> None:
    styles = [str(bar_text(part, 4, 0.10, 0.75).spans[0].style) for part in (0.05, 0.3, 0.9)]
    assert styles == ["green", "yellow", "red"]


def test_printed_to_a_pipe_there_is_no_colour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_status(typical())
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines() == [line for line in out.splitlines() if line == line.rstrip()]
