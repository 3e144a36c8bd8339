"""When a changed file is read, and when a bad one is reported."""

from __future__ import annotations

import os
from pathlib import Path

from gpumesh.daemon.reload.file_follower import FileFollower, FileMarks, read_marks

OLD, HALF, NEW = FileMarks(1, 1, 10, 5), FileMarks(2, 2, 3, 5), FileMarks(3, 3, 12, 5)


def follow(*looks: FileMarks | None) -> tuple[list[int], FileFollower]:
    """At which of these looks, one a second, the file is read."""
    follower = FileFollower(1.0)
    return [second for second, marks in enumerate(looks) if follower.note_marks(marks, float(second))], follower


def test_a_file_is_read_once_when_it_has_settled() -> None:
    assert follow(OLD, OLD, OLD, OLD)[0] == [1]
    assert follow(OLD, OLD, NEW, NEW, NEW)[0] == [1, 3]


def test_a_file_that_is_being_written_is_not_read() -> None:
    assert follow(OLD, OLD, None, HALF, NEW, NEW)[0] == [1, 5]
    assert follow(OLD, OLD, HALF, OLD, OLD)[0] == [1, 4], "it may have other content than before"


def test_a_file_that_is_gone_is_looked_for_too() -> None:
    assert follow(OLD, OLD, None, None, None)[0] == [1, 3]


def test_a_bad_file_is_reported_some_seconds_after_it_was_changed() -> None:
    reads, follower = follow(OLD, OLD, HALF, HALF)
    assert reads == [1, 3]
    assert [second for second in range(3, 8) if follower.is_bad_file_due(float(second))] == [5, 6, 7]
    follower.note_marks(NEW, 6.0)
    assert not follower.is_bad_file_due(7.0), "it is being written again"


def test_each_way_to_write_a_file_is_seen(tmp_path: Path) -> None:
    file, link = tmp_path / "mesh.yaml", tmp_path / "link.yaml"
    assert read_marks(file) is None
    file.write_text("a")
    link.symlink_to(file)
    seen = [read_marks(link)]
    spare = tmp_path / "spare"
    spare.write_text("b")
    assert seen[0] is not None
    os.utime(spare, ns=(seen[0].modified_ns, seen[0].modified_ns))
    spare.rename(file)  # of the same size, and as old
    seen.append(read_marks(link))
    file.unlink()
    file.mkdir()
    seen.append(read_marks(link))
    assert len(set(seen)) == 3
