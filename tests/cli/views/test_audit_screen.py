"""The same said at any width, within it, and harmless."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from gpumesh import audit, errors
from gpumesh.cli.views import audit_screen
from gpumesh.cli.views.audit_rows import compare_nodes, draw_topology
from gpumesh.state import HostState, NodeState
from gpumesh.topology import NodeSpec
from tests.audit.build import GPU, direct, spec, state, state_with_error, state_with_smi_output, topology, without_gpus
from tests.probes.shell_host import row

ILL = state_with_smi_output(row(name="NVIDIA GeForce RTX 3090", fan_speed="ERR!"), host=HostState("box", "550.54.15"))
GONE = state_with_error(errors.ConnectRefused("nothing listens on 127.0.0.1:1"))
OTHER = replace(state(), gpus=(replace(GPU, uuid="GPU-00000000-1"),))
NODES: list[tuple[NodeSpec, NodeState]] = [
    (spec(), ILL),
    (direct(), without_gpus(state())),
    (direct("vengeance", "http://127.0.0.1:1", "http://127.0.0.1:2"), GONE),
    (replace(direct("attic", "http://127.0.0.1:9"), enabled=False), GONE),
]


def render(
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    nodes: list[tuple[NodeSpec, NodeState]] = NODES,
    *,
    encoding: str = "utf-8",
) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    monkeypatch.setattr(audit_screen, "console", lambda: Console(file=file, width=width, highlight=False))
    made = topology(*(one for one, _ in nodes))
    states = [replace(each, name=one.name) for one, each in nodes]
    audit_screen.print_comparison(list(compare_nodes(made, states, audit.collect_findings(made, states))))
    audit_screen.print_drawing(draw_topology(made, states))
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [40, 60, 80, 109, 110, 120, 160, 200])
def test_the_output_fits_its_width_and_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    text = render(monkeypatch, width)
    assert max(map(cell_len, text.splitlines())) <= width
    together = " ".join(text.split())
    for said in ("hostname-differs", "gpu-differs", "gpu-faulty", "backend-down", "same-gpu", "switched off"):
        assert said in together
    for said in ("iceland", "local", "vengeance", "attic", "RTX 4090", "RTX 3090"):
        assert said in together
    assert text.count("not reached") == 1


def test_a_wide_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = render(monkeypatch, 160).splitlines()
    assert lines[0].split() == ["NODE", "WHAT", "EXPECTED", "FOUND", "VERDICT", "WHAT", "TO", "DO"]
    assert sum(line.startswith("iceland ") for line in lines) == 1, "a node's name once"


def test_a_narrow_terminal_gets_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = render(monkeypatch, 80).splitlines()
    assert lines[0] == "  iceland"
    assert lines[1] == "● route: ssh root@203.0.113.7:13323 (up, 41 ms)"
    assert "! hostname: expected af4a84245990, found box [hostname-differs]" in lines
    assert "? route: http://127.0.0.1:9 [switched off]" in lines
    assert any(line.startswith("  → ") for line in lines)


@pytest.mark.parametrize("width", [30, 60, 80, 109, 110, 120, 200])
def test_no_path_is_broken(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    path = "/home/user/.local/share/gpumesh/a-folder-with-a-long-name/known_hosts"
    gone = state_with_error(
        errors.ConnectRefused(f"the key is not the one in {path}", hint=f"look into {path}, line 7")
    )
    text = render(monkeypatch, width, [(spec(), gone)]).partition("✗ not reached")[0]
    assert text.count(path) == 2
    assert text.startswith("NODE") == (width == 200), "a table has two columns with such a word"


def test_the_drawing_is_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    other = (spec("oslo"), OTHER)
    lines = render(monkeypatch, 100, [(spec(), state()), (direct(), state()), other]).splitlines()
    tree = lines[lines.index(next(line for line in lines if line.startswith("● RTX"))) :]
    assert [line.split()[0] for line in tree] == ["●", "├", "└", "●", "└"]


def test_a_stream_without_unicode_gets_ascii_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = render(monkeypatch, 80, encoding="ascii")
    assert "* route: " in text
    assert "\n+ iceland" in text or "\n| iceland" in text


def test_text_from_hosts_is_neither_markup_nor_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "[bold]x[/bold] \x1b]0;owned\x07[red]"
    ill = state(
        host=HostState(hostile, "1"),
        gpus=(replace(GPU, name=hostile),),
        reason=hostile,
        backend=replace(state().backend, version=hostile, models=(hostile,)),
    )
    for width in (60, 160):
        text = render(monkeypatch, width, [(spec(), ill)])
        assert "\x1b" not in text
        assert "[bold]" in text
