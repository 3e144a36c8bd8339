from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh.cli.global_options import GlobalOptions, repeat_global_options
from gpumesh.errors import UsageError
from tests.real.command import Gpumesh

slow = pytest.mark.slow


@pytest.fixture
def clean_environment(gpumesh: Gpumesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process finds what the command finds."""
    for name in ("HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, gpumesh.environment()[name])
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("GPUMESH_CONFIG", raising=False)


def test_repeated_global_options() -> None:
    assert [option.name for option in repeat_global_options()] == ["config", "quiet", "verbose"]
    assert not any(option.expose_value for option in repeat_global_options())


def test_a_missing_mesh_yaml_is_an_error(
    tmp_path: Path, clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"there is no mesh\.yaml"):
        GlobalOptions().config_file()
    with pytest.raises(UsageError, match="does not exist"):
        GlobalOptions(tmp_path / "nowhere.yaml").paths()
