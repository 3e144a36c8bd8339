from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh.cli.commands import ui
from gpumesh.cli.gateway_address import GatewayAddress
from tests.cli.in_process import invoke


@pytest.mark.parametrize(
    ("gateway", "page"),
    [
        ("http://127.0.0.1:11430", "http://127.0.0.1:11430/ui"),
        ("http://0.0.0.0:11430", "http://127.0.0.1:11430/ui"),
        ("http://[::]:11430", "http://[::1]:11430/ui"),
        ("http://10.0.0.0:80", "http://10.0.0.0:80/ui"),
    ],
)
def test_the_address_for_a_browser_here(gateway: str, page: str) -> None:
    assert ui.page_url(gateway) == page


def test_without_a_mesh_there_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "mesh.yaml"
    config.write_text("nodes: [{name: a, backend: {url: http://127.0.0.1:1}}]")
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    ended = invoke("-c", str(config), "ui", "--print", code=1)
    assert (ended.out, "`gpumesh up -d` starts it" in ended.err) == ("", True)


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A browser that writes its arguments and its environment into a file, and the gateway that it is to show."""
    program = tmp_path / "browser"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/seen\nenv >> {tmp_path}/seen\n')
    program.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(program))
    monkeypatch.setattr("sys.platform", "linux")
    address = GatewayAddress("http://127.0.0.1:11430", True, ("GATEWAY_WORD",))
    monkeypatch.setattr(ui, "find_gateway", lambda *_, **__: address)
    return tmp_path / "seen"


def test_the_key_is_named_and_never_handed_on(browser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_WORD", "hunter2")
    monkeypatch.setattr("gpumesh.config.credentials._withheld", {"GATEWAY_WORD"})
    ended = invoke("ui")
    assert (ended.out, ended.err.splitlines()) == (
        "",
        [
            "opened http://127.0.0.1:11430/ui",
            "the page asks for the gateway's key: paste the value of $GATEWAY_WORD",
        ],
    )
    seen = browser.read_text()
    assert seen.splitlines()[0] == "http://127.0.0.1:11430/ui"
    assert "hunter2" not in seen


def test_where_no_browser_can_be_opened_the_address_is_printed(
    browser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    ended = invoke("ui")
    assert ended.out == "http://127.0.0.1:11430/ui\n"
    assert "ssh -L 11430:127.0.0.1:11430" in ended.err
    monkeypatch.setenv("BROWSER", "/bin/false")
    assert invoke("ui").out == "http://127.0.0.1:11430/ui\n", "it failed"
    assert not browser.exists()
