from __future__ import annotations

from pathlib import Path

import pytest

from tests.probes.shell_host import ShellHost


@pytest.fixture
def host(tmp_path: Path) -> ShellHost:
    made = ShellHost(tmp_path)
    made.command("hostname", "echo af4a84245990")
    return made
