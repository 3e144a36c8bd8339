"""The record of a running mesh: a small file beside its log, which only a mesh that was killed leaves behind.

The mesh writes the record at its start, keeps it up to date, and removes it when it ends in order. The kernel keeps
what was written when the process is killed. So a record without a process that holds the mesh's lock tells that the
mesh was killed or has crashed (or its machine has), when, and what was in flight. The file's modification time is the
last moment at which the mesh lived, give or take ``HEARTBEAT_S``.

The requests are counted from outside, a few times a second: the way of a request does not know of the record.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from gpumesh.daemon.mesh_lock import LockWatch
from gpumesh.errors import GPUMeshError
from gpumesh.text.sentences import join_some
from gpumesh.tunnels.blocking import run_in_thread

if TYPE_CHECKING:
    from gpumesh.daemon.paths import MeshPaths
    from gpumesh.mesh.mesh import Mesh

COUNT_INTERVAL_S = 0.25  # between two counts of the requests
HEARTBEAT_S = 1.0  # the longest time between two writes
MAX_READ_BYTES = 1 << 16
MAX_NAMED = 5  # groups of requests that a sentence names


@dataclass(frozen=True, slots=True)
class RequestGroup:
    """Requests for one model on one node. ``model`` is ``None`` for requests that name no model."""

    node: str
    model: str | None
    count: int


@dataclass(frozen=True, slots=True)
class OpenRequests:
    """The requests that were accepted and have not ended: those that have a slot on a node, and those that wait."""

    placed: tuple[RequestGroup, ...] = ()
    waiting: int = 0

    def __str__(self) -> str:
        """For a sentence: ``3 requests in flight (2 of a on x, 1 of b on y) and 4 waiting``."""
        count = sum(group.count for group in self.placed)
        text = "no request in flight" if count == 0 else f"{count} request{'' if count == 1 else 's'} in flight"
        if self.placed:
            groups = [f"{group.count} of {group.model or 'no model'} on {group.node}" for group in self.placed]
            text += f" ({join_some(groups, MAX_NAMED)})"
        return f"{text} and {self.waiting} waiting" if self.waiting else text


_NO_REQUESTS = OpenRequests()


@dataclass(frozen=True, slots=True)
class KilledMesh:
    """A mesh that has ended without stopping. ``at``: the last moment at which it lived."""

    pid: int
    at: datetime
    requests: OpenRequests

    def __str__(self) -> str:
        """For a sentence that goes on: ``ended without stopping (killed or crashed) at …, with …``, in local time."""
        time = f"{self.at.astimezone():%Y-%m-%d %H:%M:%S}"
        return f"ended without stopping (killed or crashed) at {time}, with {self.requests}"


class RunRecord:
    """The record of the mesh in this process. Use it as a context manager: at its end the file is removed."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._requests: OpenRequests | None = None  # as written last

    def __repr__(self) -> str:
        return f"<RunRecord {self._path.name} {self._requests}>"

    @classmethod
    def begin(cls, path: Path) -> Self:
        """Makes the file, instead of that of an earlier mesh. Raises OSError."""
        with suppress(FileNotFoundError):
            path.unlink()
        record = cls(path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        record.write(OpenRequests())
        return record

    def write(self, requests: OpenRequests) -> None:
        """Writes what is in flight now; only the time, if that is what the file says already. Raises OSError."""
        if requests == self._requests:
            os.utime(self._descriptor)
            return
        # One write of one line: a process that is killed leaves the old line or the new one. What a longer old line
        # leaves after the new one is not read.
        os.pwrite(self._descriptor, _encode(requests), 0)
        self._requests = requests

    async def keep(self, mesh: Mesh) -> None:
        """Keeps the file up to date until it is cancelled. A file that cannot be written is left as it is."""
        loop = asyncio.get_running_loop()
        written_at = -HEARTBEAT_S
        while True:
            requests = count_open_requests(mesh)
            if requests != self._requests or loop.time() - written_at >= HEARTBEAT_S:
                with suppress(OSError):
                    await run_in_thread(self.write, requests)  # the disk may be slow, or on a network
                written_at = loop.time()
            await asyncio.sleep(COUNT_INTERVAL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)


def count_open_requests(mesh: Mesh) -> OpenRequests:
    """Counts the requests of the mesh, by node and model."""
    if mesh.request_counters.in_flight == 0:
        return _NO_REQUESTS
    groups = Counter((node.name, model) for node in mesh.fleet for model in node.ledger.models_in_flight())
    placed = tuple(RequestGroup(node, model, count) for (node, model), count in groups.most_common())
    return OpenRequests(placed, max(mesh.request_counters.in_flight - groups.total(), 0))


def find_killed_mesh(paths: MeshPaths) -> KilledMesh | None:
    """Returns the mesh that ran last for this configuration, if it has ended without stopping. ``None`` if a mesh runs
    or has ended in order."""
    killed = read_record(paths)
    if killed is None or _runs(paths):
        return None
    # A mesh that ended in order while we looked has removed its record before its lock.
    return killed if paths.run_record.exists() else None


def read_record(paths: MeshPaths) -> KilledMesh | None:
    """Returns what the record says, whether its mesh runs or not; ``None`` if there is no record."""
    try:
        with paths.run_record.open("rb") as file:
            status = os.fstat(file.fileno())
            line = file.readline(MAX_READ_BYTES)
    except OSError:
        return None
    pid, requests = _decode(line)
    return KilledMesh(pid, datetime.fromtimestamp(status.st_mtime, UTC), requests)


def _runs(paths: MeshPaths) -> bool:
    """Whether a process holds the mesh's lock."""
    try:
        watch = LockWatch.open(paths)
    except GPUMeshError:  # the file is not ours
        return False
    if watch is None:
        return False
    with watch:
        return watch.held


def _encode(requests: OpenRequests) -> bytes:
    groups = [[group.node, group.model, group.count] for group in requests.placed]
    return json.dumps({"pid": os.getpid(), "placed": groups, "waiting": requests.waiting}).encode() + b"\n"


def _decode(line: bytes) -> tuple[int, OpenRequests]:
    """Returns the pid and the requests of a record. Of a line of another version, or of a mesh that was killed before
    it wrote one, returns the pid 0 and no requests."""
    try:
        document = json.loads(line)
        groups = tuple(RequestGroup(str(node), model, int(count)) for node, model, count in document["placed"])
        return int(document["pid"]), OpenRequests(groups, int(document["waiting"]))
    except (ValueError, KeyError, TypeError):
        return 0, OpenRequests()
