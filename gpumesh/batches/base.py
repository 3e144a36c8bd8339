"""The interfaces of batches: ``BatchStore``, which keeps them, and ``Sender``, which sends one request.

Several processes use one store at the same time: the running meshes work on the batches, and commands open the store
too, also while no mesh runs. The values and the statuses of a batch are in ``values.py``.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Collection, Sequence
from types import TracebackType
from typing import Protocol, Self

from gpumesh.batches.values import (
    COMMAND_LINE,
    Batch,
    BatchRequest,
    BatchStatus,
    Claim,
    LineError,
    NewBatch,
    NewRequest,
    RecordedResult,
    Release,
    Reply,
    Result,
    StoredFile,
)


class BatchStore(Protocol):
    """Keeps files, batches, requests and results. An async context manager: entering opens it, leaving closes it.

    All methods may be called from several tasks at once. Each call takes little time of the event loop, whatever the
    size of the file or batch: long work is done in pieces. What a method has done when it returns outlives a kill of
    every process that uses the store.

    All methods raise BatchStoreError if the store cannot be used now: the disk is full, Redis is away. Then nothing has
    changed, unless the docstring says otherwise, and the same call may be tried again later. With an id that the store
    does not have they raise BatchNotFound.
    """

    @property
    def description(self) -> str:
        """Where the batches are, for people: ``/home/…/batches/0123.sqlite`` or ``Redis at host:6379``."""

    @property
    def is_shared(self) -> bool:
        """Whether gateways with other nodes may work on the same batches."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    # -- files ---------------------------------------------------------------------------------------------------

    async def create_file(
        self, name: str, chunks: AsyncIterable[bytes], *, owner: str = COMMAND_LINE, purpose: str = "batch"
    ) -> StoredFile:
        """Stores a file of any size, from chunks of any sizes. Nobody sees it before it is whole. An error that the
        iterator raises goes on to the caller; then, and when the process is killed, no part of the file stays."""

    async def get_file(self, file_id: str) -> StoredFile: ...

    async def list_files(
        self, *, owner: str | None = None, after: str | None = None, limit: int = 100
    ) -> list[StoredFile]:
        """The files of this owner (``None``: of all), the newest first, those of the same time by their ids. ``after``:
        the id of the last file of the call before; an id that the store does not have any more gives an empty list."""

    def read_file(self, file_id: str, offset: int = 0, size: int | None = None) -> AsyncIterator[bytes]:
        """The bytes of a file from ``offset`` on, ``size`` of them (``None``: all), in chunks of at most 256 KiB.
        Raises BatchNotFound at the first iteration, also if the file is deleted meanwhile."""

    async def delete_file(self, file_id: str) -> None:
        """Raises BatchConflict if a batch that has not ended needs the file."""

    # -- batches -------------------------------------------------------------------------------------------------

    async def create_batch(self, new: NewBatch) -> Batch:
        """Makes a batch in status VALIDATING. Raises BatchNotFound if there is no such file."""

    async def get_batch(self, batch_id: str) -> Batch: ...

    async def list_batches(
        self,
        *,
        owner: str | None = None,
        after: str | None = None,
        limit: int = 100,
        statuses: Collection[BatchStatus] | None = None,
    ) -> list[Batch]:
        """The batches of this owner (``None``: of all), with one of the ``statuses`` (``None``: all), the newest first.
        ``after``: as for ``list_files``."""

    async def cancel(self, batch_id: str) -> Batch:
        """Lets no more requests be claimed. The requests under way are ended by their workers (``renew``); when there
        are none, the batch is CANCELLED. Results stay. Of a batch that is CANCELLING or CANCELLED nothing changes.
        Raises BatchConflict if it has ended otherwise."""

    async def retry(self, batch_id: str) -> Batch:
        """Makes all requests that have failed, or have no result, be sent again: their results are removed, their tries
        start at 0, and the window starts anew. Nothing changes if there is no such request. Raises BatchConflict if the
        batch has not ended, has FAILED, or its input file was deleted."""

    async def delete_batch(self, batch_id: str) -> None:
        """Deletes a batch with its results; its input file stays. Raises BatchConflict if it has not ended."""

    async def count_recent_results(self, batch_id: str, seconds: float) -> int:
        """How many results were recorded in the last ``seconds``, which are 600 at most: for the rate."""

    # -- the requests of a new batch (``validation.py``) ---------------------------------------------------------

    async def add_requests(
        self,
        batch_id: str,
        requests: Sequence[NewRequest],
        errors: Sequence[LineError],
        *,
        after_line: int,
        through_line: int,
    ) -> bool:
        """Adds what the lines after ``after_line`` up to ``through_line`` are, at once or not at all. Does nothing and
        returns False unless the batch is VALIDATING and its ``read_lines`` is ``after_line``: another process reads the
        file too, and was faster."""

    async def finish_validation(self, batch_id: str, *, through_line: int) -> Batch:
        """The file has no more lines. A batch that is VALIDATING and has ``read_lines`` equal to ``through_line``
        becomes IN_PROGRESS, or FAILED if it has no request. Else nothing changes."""

    # -- work ----------------------------------------------------------------------------------------------------

    async def begin_work(self, worker: str) -> None:
        """Called once by each worker, before it claims. ``worker`` is a name that no other worker has had. A store with
        one worker at a time frees here what a killed one had claimed."""

    async def claim(self, worker: str, count: int, *, lease_s: float, without: Collection[str] = ()) -> list[Claim]:
        """Takes up to ``count`` requests: those without a result that nobody has claimed, or whose lease has ended.
        Those of older batches come first, in a batch those of the least ``order``. Requests of batches whose window has
        passed are given out too, so that the worker records that. Those of the batches ``without`` are left to other
        workers until their window has passed. A claim ends with ``record`` or ``release``, or
        after ``lease_s`` seconds without ``renew``."""

    async def renew(self, worker: str, claims: Collection[Claim], *, lease_s: float) -> set[tuple[str, int]]:
        """Lets the claims last ``lease_s`` seconds from now on. Returns the keys of those that are not wanted any more:
        their batch is CANCELLING or was deleted, or another worker has claimed them since their lease ended. The worker
        ends and releases them."""

    async def release(self, worker: str, releases: Sequence[Release]) -> None:
        """Gives claims back. A claim that this worker does not have any more is ignored."""

    async def record(self, worker: str, results: Sequence[Result]) -> int:
        """Stores the results and ends their claims, at once or not at all. A request that has a result already keeps
        it. The result of a claim whose lease has ended is stored too; that of a deleted batch is not. A batch whose
        last request gets its result ends: as EXPIRED if a result is ``expired``, else as COMPLETED. Returns how many
        results were new."""

    async def settle(self) -> None:
        """Does what only time brings; called every few seconds by each worker. Ends the batches that are CANCELLING and
        have no request under way. Removes what was kept for ``KEPT_S``, and the parts of files that were never
        whole."""

    async def wait_for_change(self, timeout_s: float) -> None:
        """Returns when somebody may have made or changed a batch since the last call, or after ``timeout_s``. Raises
        nothing."""

    # -- results -------------------------------------------------------------------------------------------------

    async def read_results(
        self, batch_id: str, *, after: str = "", limit: int = 100, failed: bool | None = None
    ) -> list[RecordedResult]:
        """Up to ``limit`` results in the order in which they were recorded, after the ``position`` ``after`` (empty:
        from the first). ``failed``: only those that have failed, or have not. Results that are recorded later have
        later positions, also after ``retry``. Returns fewer than ``limit`` also to bound the bytes of one call; only an
        empty list says that there are no more now."""

    async def read_results_by_line(
        self, batch_id: str, *, after_line: int = 0, limit: int = 100
    ) -> list[RecordedResult]:
        """As ``read_results``, in the order of the lines of the input file."""


class Sender(Protocol):
    """Sends requests of batches through the mesh."""

    async def send(self, request: BatchRequest) -> Reply:
        """Sends the request at priority ``batch`` with the rights and quotas of its owner, and returns the whole
        answer. Cancelling ends the work on the host.

        Raises BatchOwnerUnknown if this gateway does not have the owner's key, and another gateway may have it. Raises
        GPUMeshError if no server has answered, with its true type, because it decides about another try
        (``retries.py``): QueueFull, NoNodeError, DeadlineExceeded, StreamCut, TooManyRequests of the gateway …"""
