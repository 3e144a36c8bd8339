"""Tests beside each other, and one alone: with real processes, as pytest-xdist has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lanes import hold_lane

ROOT = Path(__file__).parents[1]

# Says when it is in, and leaves when its stdin is closed.
HOLDER = """
import sys
from pathlib import Path
from tests.lanes import hold_lane
print("asks", flush=True)
with hold_lane(Path(sys.argv[1]), alone=sys.argv[2] == "alone"):
    print("in", flush=True)
    sys.stdin.read()
"""


class Holder:
    def __init__(self, folder: Path, how: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), how],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.until("asks")

    def until(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"

    def leave(self) -> None:
        self.process.communicate()


def waits(pid: int, file: Path) -> bool:
    """Whether the kernel has it waiting for a lock on this file: then it is in no turn."""
    inode = f":{file.stat().st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f" {pid} " in line and inode in line for line in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_one_alone_waits_for_all_and_is_not_overtaken(tmp_path: Path) -> None:
    first, second = Holder(tmp_path, "shared"), Holder(tmp_path, "shared")
    first.until("in")
    second.until("in")
    single = Holder(tmp_path, "alone")
    while not waits(single.process.pid, tmp_path / "room"):
        pass
    late = Holder(tmp_path, "shared")
    while not waits(late.process.pid, tmp_path / "door"):
        pass
    first.leave()
    assert waits(single.process.pid, tmp_path / "room"), "one is still in"
    second.leave()
    single.until("in")
    while not waits(late.process.pid, tmp_path / "room"):
        pass
    single.leave()
    late.until("in")
    late.leave()


def test_who_dies_is_not_waited_for(tmp_path: Path) -> None:
    single = Holder(tmp_path, "alone")
    single.until("in")
    single.process.kill()
    single.leave()
    with hold_lane(tmp_path, alone=True):
        pass
