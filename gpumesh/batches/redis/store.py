"""``RedisBatchStore``: the batches of a mesh in Redis, so that every gateway of the mesh works on them.

The requests of a batch are a stream with a consumer group. Each change is one call of a Lua function, which Redis does
in one step (``lua/common.lua`` has the keys). All keys expire. How long a killed Redis remembers a change is decided by
its persistence: with ``appendonly yes`` everything that a method has done before it returned.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Self

from gpumesh.batches.redis import answers
from gpumesh.batches.redis.answers import Argument
from gpumesh.batches.redis.files import UPLOAD_SILENT_S, RedisFiles
from gpumesh.batches.redis.script import RedisScript
from gpumesh.batches.values import (
    KEPT_S,
    MAX_KEPT_ERRORS,
    Batch,
    BatchStatus,
    Claim,
    LineError,
    NewBatch,
    NewRequest,
    RecordedResult,
    Release,
    Result,
)
from gpumesh.coordination.redis_urls import ReadPassword
from gpumesh.errors import BatchStoreError

MAX_ANSWER_BYTES = 4 << 20  # the contents in one answer have about so many bytes at most: Redis does nothing else then


class RedisBatchStore(RedisFiles):
    """The ``BatchStore`` of the mesh named ``mesh`` in the Redis at ``url``.

    The arguments are as those of ``RedisScript``; ``kept_s`` is that of ``values.KEPT_S``.
    """

    def __init__(
        self,
        url: str,
        mesh: str,
        *,
        password: ReadPassword,
        sentinel_password: ReadPassword = lambda: None,
        ca_file: str | None = None,
        kept_s: float = KEPT_S,
    ) -> None:
        script = RedisScript(url, mesh, password=password, sentinel_password=sentinel_password, ca_file=ca_file)
        super().__init__(script, kept_s=kept_s)
        self._newest_change = "0-0"  # the entry of the stream ``changes`` up to which ``wait_for_change`` has waited

    def __repr__(self) -> str:
        return f"<RedisBatchStore {self.description}>"

    @property
    def is_shared(self) -> bool:
        return True

    @property
    def description(self) -> str:
        return self._script.description

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._script.close()

    # -- batches -------------------------------------------------------------------------------------------------

    async def create_batch(self, new: NewBatch) -> Batch:
        batch_id = f"batch_{secrets.token_hex(12)}"
        metadata = json.dumps(dict(new.metadata))
        fields = ("endpoint", new.endpoint, "name", new.name, "metadata", metadata)
        return await self._call_for_batch(
            "create_batch", batch_id, new.input_file_id, new.window_s, self._kept_s, new.owner, *fields
        )

    async def get_batch(self, batch_id: str) -> Batch:
        return await self._call_for_batch("get_batch", batch_id)

    async def list_batches(
        self,
        *,
        owner: str | None = None,
        after: str | None = None,
        limit: int = 100,
        statuses: Collection[BatchStatus] | None = None,
    ) -> list[Batch]:
        if statuses is not None and not statuses:
            return []
        every_owner = "1" if owner is None else "0"
        wanted = [str(status) for status in statuses or ()]
        answer = await self._script.ask("list_batches", owner or "", every_owner, after or "", limit, *wanted)
        return answers.read_batches(answer)

    async def cancel(self, batch_id: str) -> Batch:
        return await self._call_for_batch("cancel", batch_id)

    async def retry(self, batch_id: str) -> Batch:
        return await self._call_for_batch("retry", batch_id)

    async def delete_batch(self, batch_id: str) -> None:
        await self._script.call("delete_batch", batch_id)

    async def count_recent_results(self, batch_id: str, seconds: float) -> int:
        count = await self._script.ask("count_recent_results", batch_id, min(seconds, 600.0))
        return answers.read_number(count)

    async def _call_for_batch(self, function: str, batch_id: str, *arguments: Argument) -> Batch:
        """Calls a function that answers with a batch, again as long as it answers that there is more to do."""
        while True:
            match await self._script.call(function, batch_id, *arguments):
                case [batch, b"more"]:
                    await asyncio.sleep(0)
                case [batch]:
                    return answers.read_batch(batch)
                case _:
                    raise self._script.wrong_answer()

    # -- the requests of a new batch -----------------------------------------------------------------------------

    async def add_requests(
        self,
        batch_id: str,
        requests: Sequence[NewRequest],
        errors: Sequence[LineError],
        *,
        after_line: int,
        through_line: int,
    ) -> bool:
        bad_lines = [answers.write_error(error) for error in errors]
        members = [answers.write_request(request) for request in requests]
        numbers = (after_line, through_line, MAX_KEPT_ERRORS, len(bad_lines))
        was_added = await self._script.ask("add_requests", batch_id, *numbers, *bad_lines, *members)
        return answers.read_number(was_added) == 1

    async def finish_validation(self, batch_id: str, *, through_line: int) -> Batch:
        return await self._call_for_batch("finish_validation", batch_id, through_line)

    # -- work ----------------------------------------------------------------------------------------------------

    async def begin_work(self, worker: str) -> None:
        """Does nothing: other workers may live, so what a killed one had claimed is free when its leases end."""

    async def claim(self, worker: str, count: int, *, lease_s: float, without: Collection[str] = ()) -> list[Claim]:
        number = secrets.token_hex(4)
        lease_ms = _milliseconds(lease_s)
        answer = await self._script.ask("claim", worker, number, count, lease_ms, MAX_ANSWER_BYTES, *without)
        return answers.read_claims(answer)

    async def renew(self, worker: str, claims: Collection[Claim], *, lease_s: float) -> set[tuple[str, int]]:
        claims = list(claims)
        arguments = [argument for claim in claims for argument in (claim.batch_id, claim.token)]
        wanted = await self._script.ask("renew", worker, _milliseconds(lease_s), *arguments)
        return answers.read_unwanted(claims, wanted)

    async def release(self, worker: str, releases: Sequence[Release]) -> None:
        arguments: list[Argument] = []
        for release in releases:
            claim, counts = release.claim, "1" if release.counts else "0"
            arguments += [claim.batch_id, claim.token, claim.line, _milliseconds(release.delay_s), counts]
        if arguments:
            await self._script.call("release", worker, *arguments)

    async def record(self, worker: str, results: Sequence[Result]) -> int:  # noqa: ARG002 - of any worker, also a late one
        arguments: list[Argument] = []
        for result in results:
            claim, kind, is_expired = (
                result.claim,
                "failed" if result.failed else "output",
                "1" if result.expired else "0",
            )
            arguments += [claim.batch_id, claim.token, claim.line, kind, is_expired, result.content]
        new = await self._script.ask("record", *arguments)
        return answers.read_number(new)

    async def settle(self) -> None:
        await self._script.call("settle", UPLOAD_SILENT_S)

    async def wait_for_change(self, timeout_s: float) -> None:
        started_at = time.monotonic()
        try:
            self._newest_change = await self._script.wait_for_entry("changes", self._newest_change, timeout_s)
        except BatchStoreError:  # Redis is away: others will say so, and the caller looks again later
            await asyncio.sleep(timeout_s - (time.monotonic() - started_at))

    # -- results -------------------------------------------------------------------------------------------------

    async def read_results(
        self, batch_id: str, *, after: str = "", limit: int = 100, failed: bool | None = None
    ) -> list[RecordedResult]:
        kinds = {None: ("output", "failed"), False: ("output",), True: ("failed",)}[failed]
        answer = await self._script.ask("read_results", batch_id, after or "0-0", limit, MAX_ANSWER_BYTES, *kinds)
        return answers.read_results(answer)

    async def read_results_by_line(
        self, batch_id: str, *, after_line: int = 0, limit: int = 100
    ) -> list[RecordedResult]:
        answer = await self._script.ask("read_results_by_line", batch_id, after_line, limit, MAX_ANSWER_BYTES)
        return answers.read_results(answer)


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))
