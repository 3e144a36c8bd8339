from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpumesh.audit import CATALOG
from gpumesh.cli.commands.explain import MAX_TEXT_WIDTH, app, complete_codes
from gpumesh.errors import UsageError
from tests.real.command import Gpumesh
from tests.tunnels.polling import wait_until

runner = CliRunner()


@pytest.mark.parametrize("code", CATALOG)
def test_every_code(code: str) -> None:
    ended = runner.invoke(app, [code])
    assert ended.exit_code == 0
    entry = CATALOG[code]
    assert ended.stdout.splitlines() == [
        f"{code} ({entry.severity}): {entry.title}",
        "",
        entry.meaning,
        f"What to do: {entry.remedy}",
    ]


@pytest.mark.parametrize("said", ["SAME-GPU", "same_gpu", " same gpu "])
def test_a_code_as_people_write_it(said: str) -> None:
    assert runner.invoke(app, [said]).stdout.startswith("same-gpu (warning)")


def test_all_of_them_a_line_each() -> None:
    lines = runner.invoke(app, []).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(CATALOG)
    assert len({line.index(CATALOG[code].title) for line, code in zip(lines, CATALOG, strict=True)}) == 1


@pytest.mark.parametrize(("said", "hint"), [("gpu-los", "did you mean gpu-lost"), ("zzz", "lists all codes")])
def test_no_such_code(said: str, hint: str) -> None:
    error = runner.invoke(app, [said]).exception
    assert isinstance(error, UsageError)
    assert error.hint is not None
    assert hint in error.hint


def test_completion() -> None:
    assert set(complete_codes("gpu-c")) == {"gpu-count", "gpu-cgroup-lost"}
    assert set(complete_codes("")) == set(CATALOG)


@pytest.mark.parametrize("columns", [40, 200])
async def test_on_a_terminal_its_lines_end_at_the_ends_of_words(tmp_path: Path, columns: int) -> None:
    gpumesh = Gpumesh(tmp_path / "mesh.yaml", tmp_path, tmp_path)
    async with gpumesh.terminal("explain", "same-gpu", columns=columns) as screen:
        assert await screen.wait_exit() == 0
        await wait_until(lambda: "backend.urls" in screen.written, "its last words")
    lines = screen.written.replace("\r", "").splitlines()
    entry = CATALOG["same-gpu"]
    assert max(map(len, lines)) <= min(columns, MAX_TEXT_WIDTH)
    assert " ".join(lines[2:]).strip() == f"{entry.meaning} What to do: {entry.remedy}"
