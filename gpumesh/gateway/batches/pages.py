"""Pages of a list: which part of it a client asks for, and that part out of a store's newest-first lists."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar
from urllib.parse import parse_qs

from gpumesh.gateway.batches.documents import ID_PATTERN
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Request

READ_AT_A_TIME = 200  # entries of one call of the store
MAX_REVERSED = 20_000  # entries that are read to find the oldest


class Entry(Protocol):
    """A file or a batch."""

    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Entry)
ReadList = Callable[[str | None, int], Awaitable[list[T]]]
"""Returns entries, the newest first: those after the entry with this id (``None``: from the newest), so many at
most."""


@dataclass(frozen=True, slots=True)
class PageQuery:
    """What a client asks for. ``after``: the id of the last entry that it has. ``purpose``: of files."""

    limit: int
    after: str | None = None
    oldest_first: bool = False
    purpose: str | None = None


def read_page_query(request: Request, *, default_limit: int, max_limit: int) -> PageQuery:
    """The part of a list that the request's query asks for. Raises BadRequest for a value that is out of range."""
    try:
        query = parse_qs(request.target.partition("?")[2], max_num_fields=20)
    except ValueError:
        raise BadRequest("the query has too many members") from None
    limit = query.get("limit", [str(default_limit)])[0]
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 6 and 1 <= int(limit) <= max_limit):
        raise BadRequest(f"limit is a number from 1 to {max_limit}")
    order = query.get("order", ["desc"])[0]
    if order not in ("asc", "desc"):
        raise BadRequest("order is asc or desc")
    after = query.get("after", [None])[0]
    if after is not None and re.fullmatch(ID_PATTERN, after) is None:
        raise BadRequest("after is the id of the last entry of the page before")
    return PageQuery(int(limit), after, order == "asc", query.get("purpose", [None])[0])


async def read_page(read_list: ReadList[T], query: PageQuery) -> tuple[list[T], bool]:
    """The entries that the query asks for, and whether there are more after them."""
    if query.oldest_first:
        entries = await _read_all(read_list, None, MAX_REVERSED)
        entries.reverse()
        if query.after is not None:
            position = next((index for index, entry in enumerate(entries) if entry.id == query.after), len(entries))
            entries = entries[position + 1 :]
    else:
        entries = await _read_all(read_list, query.after, query.limit + 1)
    return entries[: query.limit], len(entries) > query.limit


async def _read_all(read_list: ReadList[T], after: str | None, count: int) -> list[T]:
    """Up to ``count`` entries after this one."""
    entries: list[T] = []
    while len(entries) < count:
        part = await read_list(after, min(count - len(entries), READ_AT_A_TIME))
        if not part:
            break
        entries += part
        after = part[-1].id
    return entries
