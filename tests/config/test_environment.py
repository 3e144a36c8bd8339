from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import pytest

from gpumesh.config import credentials, environment
from gpumesh.errors import GPUMeshError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_runtime_folder_is_private_whatever_the_umask(run: Path) -> None:
    before = os.umask(0)
    try:
        assert environment.runtime_dir() == run / "gpumesh"
    finally:
        os.umask(before)
    assert mode(run / "gpumesh") == 0o700
    assert environment.runtime_dir() == run / "gpumesh"


def test_a_folder_that_others_may_read_is_closed_to_them(run: Path) -> None:
    (run / "gpumesh").mkdir()
    (run / "gpumesh").chmod(0o755)
    environment.runtime_dir()
    assert mode(run / "gpumesh") == 0o700


def test_a_folder_that_others_could_have_filled_is_not_used(run: Path) -> None:
    (run / "gpumesh").mkdir()
    (run / "gpumesh").chmod(0o777)
    with pytest.raises(GPUMeshError, match="may be written to by other users"):
        environment.runtime_dir()


def test_a_link_in_its_place_is_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (run / "gpumesh").symlink_to(tmp_path / "theirs")
    with pytest.raises(GPUMeshError, match="is a symbolic link"):
        environment.runtime_dir()


def test_a_file_in_its_place_is_told(run: Path) -> None:
    (run / "gpumesh").write_text("x")
    with pytest.raises(GPUMeshError, match="is not a folder"):
        environment.runtime_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_folder_of_another_user_is_not_used(run: Path) -> None:
    (run / "gpumesh").mkdir(mode=0o700)
    os.chown(run / "gpumesh", 12345, 12345)
    with pytest.raises(GPUMeshError, match="belongs to another user"):
        environment.runtime_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_another_user_s_xdg_runtime_dir_is_passed_over(run: Path) -> None:
    """As `su` and `sudo` leave it."""
    os.chown(run, 12345, 12345)
    assert environment.runtime_dir() == Path(f"/tmp/gpumesh-{os.geteuid()}")


@pytest.mark.parametrize("value", ["", "relative/path", "/does/not/exist"])
def test_without_a_usable_xdg_runtime_dir(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    folder = environment.runtime_dir()
    assert folder == Path(f"/tmp/gpumesh-{os.geteuid()}")
    assert mode(folder) == 0o700


def test_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "deep" / "state"))
    assert environment.state_dir() == tmp_path / "deep" / "state" / "gpumesh"
    assert mode(environment.state_dir()) == 0o700
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(GPUMeshError, match="cannot make the folder"):
        environment.state_dir()


def test_without_a_home_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert environment.state_dir() == tmp_path / "gpumesh" / "state"
    assert mode(environment.state_dir()) == 0o700


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, on in (("", False), ("1", True), ("0", True)):
        monkeypatch.setenv("NO_COLOR", value)
        assert environment.no_color() is on
    for value, on in (("", False), ("true", True), ("0", False), ("false", False)):
        monkeypatch.setenv("CI", value)
        assert environment.is_ci() is on
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert environment.shell() == "fish"
    monkeypatch.delenv("SHELL")
    assert environment.shell() is None
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    assert environment.ssh_auth_sock() == Path("/run/agent")


def test_the_environment_of_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("GONE", "1")
    child = environment.child_environment({"GONE": None, "NEW": "2"})
    assert (child["KEPT"], child["NEW"], "GONE" in child) == ("1", "2", False)
    assert os.environ["GONE"] == "1"


def test_a_user_without_variables_and_without_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    for name in ("LOGNAME", "USER", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert environment.user() == pwd.getpwuid(os.getuid()).pw_name
    assert environment.variables()["LOGNAME"] == environment.user()


def test_a_program_is_given_the_environment_without_what_mesh_yaml_names_for_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GM_TEST_PASSWORD", "x")
    monkeypatch.setenv("GM_TEST_PROVIDER_API_KEY", "y")
    assert environment.child_environment()["GM_TEST_PASSWORD"] == "x"
    credentials.withhold_variables({"GM_TEST_PASSWORD"})
    assert "GM_TEST_PASSWORD" not in environment.child_environment()
    assert environment.child_environment()["GM_TEST_PROVIDER_API_KEY"] == "y", "nobody but who needs it has named it"
    assert environment.child_environment({"GM_TEST_PASSWORD": "z"})["GM_TEST_PASSWORD"] == "z", "said on purpose"


STARTS = {"create_subprocess_exec", "create_subprocess_shell", "Popen", "run", "call", "check_call", "check_output"}
WHOLE = {"daemon/background.py"}  # the background mesh itself, which reads its secrets there


def test_every_program_is_started_with_such_an_environment() -> None:
    """Whoever adds one must not forget it."""
    package = Path(environment.__file__).parent.parent
    missing, seen = [], 0
    for file in package.rglob("*.py"):
        text = file.read_text()
        for call in ast.walk(ast.parse(text)) if "subprocess" in text else ():
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in STARTS:
                owner = ast.unparse(call.func.value)
                if owner not in ("asyncio", "subprocess"):
                    continue
                if owner == "asyncio" and call.func.attr == "run":
                    continue
                seen += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                if not given.get("env", "").startswith("environment.child_environment("):
                    missing.append(file.relative_to(package).as_posix())
    assert seen >= 7
    assert set(missing) == WHOLE
