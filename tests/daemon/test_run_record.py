"""The record that a mesh keeps while it runs, and what is known from it after a kill."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from gpumesh.daemon.mesh_lock import MeshLock
from gpumesh.daemon.mesh_process import run_mesh
from gpumesh.daemon.run_record import OpenRequests, RequestGroup, RunRecord, find_killed_mesh, read_record
from gpumesh.daemon.shutdown import Shutdown
from tests.daemon.test_mesh_process import TOPOLOGY, lines, paths_in

BUSY = OpenRequests((RequestGroup("iceland", "qwen2.5:7b", 2), RequestGroup("local", None, 1)), 4)


@pytest.mark.parametrize(
    ("requests", "text"),
    [
        (OpenRequests(), "no request in flight"),
        (OpenRequests((RequestGroup("a", "m", 1),)), "1 request in flight (1 of m on a)"),
        (OpenRequests(waiting=2), "no request in flight and 2 waiting"),
        (BUSY, "3 requests in flight (2 of qwen2.5:7b on iceland, 1 of no model on local) and 4 waiting"),
    ],
)
def test_requests_in_a_sentence(requests: OpenRequests, text: str) -> None:
    assert str(requests) == text


def test_a_record_without_a_lock_is_of_a_killed_mesh(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    paths.log.parent.mkdir()
    assert find_killed_mesh(paths) is None
    lock = MeshLock.acquire(paths)
    with RunRecord.begin(paths.run_record) as record:
        record.write(BUSY)
        assert find_killed_mesh(paths) is None, "its process holds the lock"
        lock.release()  # as the kernel does when the process is killed
        killed = find_killed_mesh(paths)
        assert killed is not None
        assert (killed.pid, killed.requests) == (os.getpid(), BUSY)
        assert abs(killed.at.timestamp() - time.time()) < 5
        record.write(OpenRequests())  # shorter than the line before
        killed = find_killed_mesh(paths)
        assert killed is not None
        assert killed.requests == OpenRequests()
    assert find_killed_mesh(paths) is None, "it has ended in order"


def test_the_time_of_the_last_write_counts(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    paths.log.parent.mkdir()
    with RunRecord.begin(paths.run_record) as record:
        os.utime(paths.run_record, (0, 0))
        record.write(OpenRequests())  # the same as before: only the time is written
        killed = read_record(paths)
    assert killed is not None
    assert killed.at.year > 2000


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1, "placed": [[1]], "waiting": 0}\n'])
def test_a_record_that_cannot_be_read_tells_that_the_mesh_was_killed(tmp_path: Path, text: str) -> None:
    paths = paths_in(tmp_path)
    paths.log.parent.mkdir()
    paths.run_record.write_text(text)
    killed = find_killed_mesh(paths)
    assert killed is not None
    assert (killed.pid, killed.requests) == (0, OpenRequests())


async def test_the_next_mesh_accounts_for_it_in_its_log(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    paths.log.parent.mkdir()
    group = [["iceland", "qwen2.5:7b\x1b[31m", 2]]
    paths.run_record.write_text(json.dumps({"pid": 4711, "placed": group, "waiting": 1}) + "\n")
    async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown()):
        running = read_record(paths)
        assert running is not None
        assert running.pid == os.getpid()
    assert not paths.run_record.exists()
    (killed,) = [line for line in lines(paths) if line["event"] == "killed"]
    assert killed["level"] == "error"
    assert killed["message"].startswith(
        "the mesh before this one (pid 4711) ended without stopping (killed or crashed) at "
    )
    assert killed["message"].endswith("2 requests in flight (2 of qwen2.5:7b\x1b[31m on iceland) and 1 waiting")
    paths.create_folder()
    async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown()):
        pass
    assert sum(line["event"] == "killed" for line in lines(paths)) == 1, "it is told once"


async def test_a_mesh_runs_where_no_record_can_be_kept(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    paths.run_record.mkdir(parents=True)
    async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown()):
        assert paths.socket.exists()
    assert any(line["event"] == "record" for line in lines(paths))
