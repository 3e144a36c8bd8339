"""The lock of exclusive tests, with real processes as pytest-xdist has them, and the order of the tests."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.parallel_runs import import_share, is_exclusive, machine_lock, order_tests

ROOT = Path(__file__).parents[1]

# Reports when it has the lock, and releases it when its stdin is closed.
HOLDER = """
import sys
from pathlib import Path
from tests.parallel_runs import machine_lock
print("asks", flush=True)
with machine_lock(Path(sys.argv[1]), exclusive=sys.argv[2] == "exclusive"):
    print("has it", flush=True)
    sys.stdin.read()
"""


class LockHolder:
    def __init__(self, folder: Path, mode: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), mode],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.wait_for("asks")

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{line}\n"

    def release(self) -> None:
        self.process.communicate()


def is_waiting(pid: int, file: Path) -> bool:
    """Whether the kernel has the process waiting for a lock on this file."""
    inode = f":{file.stat().st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f" {pid} " in line and inode in line for line in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_an_exclusive_test_waits_for_all_others_and_is_not_overtaken(tmp_path: Path) -> None:
    first, second = LockHolder(tmp_path, "shared"), LockHolder(tmp_path, "shared")
    first.wait_for("has it")
    second.wait_for("has it")
    exclusive = LockHolder(tmp_path, "exclusive")
    while not is_waiting(exclusive.process.pid, tmp_path / "running"):
        pass
    late = LockHolder(tmp_path, "shared")
    while not is_waiting(late.process.pid, tmp_path / "queue"):
        pass
    first.release()
    assert is_waiting(exclusive.process.pid, tmp_path / "running"), "another test still runs"
    second.release()
    exclusive.wait_for("has it")
    while not is_waiting(late.process.pid, tmp_path / "running"):
        pass
    exclusive.release()
    late.wait_for("has it")
    late.release()


def test_the_lock_of_a_process_that_dies_is_free(tmp_path: Path) -> None:
    exclusive = LockHolder(tmp_path, "exclusive")
    exclusive.wait_for("has it")
    exclusive.process.kill()
    exclusive.release()
    with machine_lock(tmp_path, exclusive=True):
        pass


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
def test_each_process_begins_with_slow_tests_and_exclusive_tests_come_last(
    request: pytest.FixtureRequest, processes: int
) -> None:
    tests = request.session.items
    ordered = order_tests(tests, processes)
    assert Counter(ordered) == Counter(tests), "each test exactly once"
    first_exclusive = next((place for place, test in enumerate(ordered) if is_exclusive(test)), len(ordered))
    assert all(is_exclusive(test) for test in ordered[first_exclusive:])


def test_each_process_imports_its_share_of_the_test_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be imported is left to the collection of the tests."""
    folder = tmp_path / "shared_out"
    folder.mkdir()
    (folder / "helper.py").write_text("raise AssertionError('no test module')")
    for name in ("a", "b", "c", "d"):
        (folder / f"test_{name}.py").write_text("raise OSError" if name == "d" else "")
    monkeypatch.syspath_prepend(tmp_path)
    for process, expected in ((1, {"b"}), (0, {"a", "b", "c"})):
        import_share(tmp_path, [folder], process, 2)
        imported = {name for name in sys.modules if name.startswith("shared_out.test_")}
        assert imported == {f"shared_out.test_{name}" for name in expected}
    for name in [name for name in sys.modules if name.startswith("shared_out")]:
        monkeypatch.delitem(sys.modules, name)
