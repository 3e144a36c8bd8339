"""One list out of many nodes' lists. Pure; what a node sent is hostile until it was parsed here.

A client reads the merged list as one document: an entry of one node that it cannot read (a number that is none, a date
that no calendar has, half of a surrogate pair) would cost it the entries of all. So an entry is made anew from what can
be read of it: of the keys that clients know each has its type or is left out, the others are passed on as far as they
are plain JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from gpumesh.backends import model_list, safe_json
from gpumesh.model_names import full_name
from gpumesh.printable import printable

# What is passed on of what we do not know: of one entry, of one text, of lists in lists.
MOST_VALUES = 200
LONGEST_TEXT = 1000
DEEPEST = 4
STEP = 250  # entries, a few milliseconds
CLOCKS_DIFFER = timedelta(days=1)
_LARGEST = (1 << 63) - 1
# RFC 3339, as the clients' own parsers want it (Go's for one).
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:Z|[+-][0-9]{2}:[0-9]{2})")
_ZERO = "0001-01-01T00:00:00Z"  # Go's word for: no time
_EARLIEST = datetime.min.replace(tzinfo=UTC)

Entry = dict[str, Any]
Reader = Callable[[Any], Any]
Moment = tuple[datetime, str]


@dataclass(frozen=True, slots=True)
class ListFormat:
    """What a list looks like: the ``key`` of its entries, and under which of ``names`` an entry has its own. ``when``
    is the key of a time by which the later one of two entries stands; without one the first stands."""

    key: str
    names: tuple[str, ...]
    readers: Mapping[str, Reader]
    when: str | None = None
    newest_first: bool = False
    head: Mapping[str, str] = field(default_factory=dict)


class MergedList:
    """The entries of many nodes' lists. ``latest_plausible_time``: what claims to be of a later time has no time."""

    def __init__(self, form: ListFormat, *, latest_time: datetime | None = None) -> None:
        self._form = form
        self._latest = latest_time
        self._found: dict[str, tuple[Moment, Entry]] = {}

    def add_body(self, body: bytes) -> Iterator[None]:
        """Reads one node's list, in steps between which others may have their turn. What is no list, or one that is too
        long, is passed over, as it is by the probes."""
        form = self._form
        document = safe_json.parse_report(body)
        listed = None if document is None else document.get(form.key)
        if not isinstance(listed, list) or len(listed) > model_list.MAX_MODELS:
            return
        yield
        # Ollama compares names without case, and knows a tag that is left out; to others a name is a name.
        same = full_name if form.when is not None else str
        for number, (name, entry) in enumerate(model_list.read_listing(listed, *form.names).entries.items()):
            made = _read(name, entry, form)
            when = self._moment(made)
            key = same(name)
            if key not in self._found or when > self._found[key][0]:
                self._found[key] = (when, made)
            if number % STEP == STEP - 1:
                yield

    def _moment(self, entry: Entry) -> Moment:
        """Within a microsecond the text decides, whose nanoseconds a moment does not hold."""
        text = entry.get(self._form.when or "")
        moment = safe_json.as_datetime(text) or _EARLIEST
        if self._latest is not None and moment > self._latest:
            del entry[self._form.when or ""]
            return _EARLIEST, ""
        return moment, text or ""

    def render(self) -> bytes:
        found = list(self._found.values())
        if self._form.newest_first:
            found.sort(key=lambda pair: pair[0], reverse=True)
        document = {**self._form.head, self._form.key: [entry for _, entry in found]}
        return json.dumps(document, allow_nan=False).encode()


def merge_tags(bodies: Iterable[bytes], *, now: datetime | None = None) -> bytes:
    """The union of ``/api/tags`` by name, newest first as Ollama lists them; of two entries the newer one stands."""
    return _union(MergedList(TAGS_FORMAT, latest_time=latest_plausible_time(now)), bodies)


def merge_loaded(bodies: Iterable[bytes]) -> bytes:
    """The union of ``/api/ps``; a model in the memory of several nodes is listed once, as it lasts longest."""
    return _union(MergedList(LOADED_FORMAT), bodies)


def merge_openai_models(bodies: Iterable[bytes]) -> bytes:
    """The union of ``/v1/models``, in the order of first mention."""
    return _union(MergedList(OPENAI_FORMAT), bodies)


def latest_plausible_time(now: datetime | None) -> datetime | None:
    """Clocks differ; but a model that was changed after this is one of a node that knows no time."""
    return None if now is None else now + CLOCKS_DIFFER


def _union(union: MergedList, bodies: Iterable[bytes]) -> bytes:
    for body in bodies:
        for _ in union.add_body(body):
            pass
    return union.render()


def _read(name: str, entry: Mapping[str, Any], form: ListFormat) -> Entry:
    made: Entry = dict.fromkeys(form.names, name)  # also where the node gave one of them only
    budget = [MOST_VALUES]
    for key, value in entry.items():
        if key in form.names:
            continue
        if (reader := form.readers.get(key)) is not None:
            if (read := reader(value)) is not None:
                made[key] = read
        elif (plain := _plain(value, budget)) is not None:
            made[printable(key, 100)] = plain
    return made


# -- keys that clients know ------------------------------------------------------------------------------------------


def _text(value: Any) -> str | None:
    return printable(value, LONGEST_TEXT) if isinstance(value, str) else None


def _texts(value: Any) -> list[str] | None:
    return [printable(text, 100) for text in value[:50] if isinstance(text, str)] if isinstance(value, list) else None


def _count(value: Any) -> int | None:
    return safe_json.as_count(value)


def _time(value: Any) -> str | None:
    """As it came, if every parser reads it; what only Python's reads is written anew."""
    moment = safe_json.as_datetime(value)
    if moment is None:
        return _ZERO if value == _ZERO else None
    return value if _TIME.fullmatch(value) else moment.isoformat().replace("+00:00", "Z")


def _details(value: Any) -> Entry | None:
    if not isinstance(value, dict):
        return None
    budget = [MOST_VALUES]
    made: Entry = {}
    for key, part in value.items():
        if key == "families":
            made[key] = _texts(part)  # Ollama has null here as well
        elif key in _DETAILS:
            if isinstance(part, str):
                made[key] = printable(part, LONGEST_TEXT)
        elif (plain := _plain(part, budget)) is not None:
            made[printable(key, 100)] = plain
    return made


def _object(_value: Any) -> str:
    return "model"


_DETAILS = frozenset({"parent_model", "format", "family", "parameter_size", "quantization_level"})
_OLLAMA: Mapping[str, Reader] = {
    "size": _count,
    "size_vram": _count,
    "context_length": _count,
    "digest": _text,
    "modified_at": _time,
    "expires_at": _time,
    "details": _details,
    "capabilities": _texts,
    "remote_model": _text,
    "remote_host": _text,
}
_OPENAI: Mapping[str, Reader] = {"object": _object, "created": _count, "owned_by": _text}

TAGS_FORMAT = ListFormat("models", ("name", "model"), _OLLAMA, "modified_at", newest_first=True)
LOADED_FORMAT = ListFormat("models", ("name", "model"), _OLLAMA, "expires_at")
OPENAI_FORMAT = ListFormat("data", ("id",), _OPENAI, head={"object": "list"})


# -- the others ------------------------------------------------------------------------------------------------------


def _plain(value: Any, budget: list[int], depth: int = 0) -> Any:
    """What of a value every JSON parser reads; ``None`` for the rest. ``budget[0]`` values at most."""
    budget[0] -= 1
    if budget[0] < 0 or depth > DEEPEST:
        return None
    if isinstance(value, str):
        return printable(value, LONGEST_TEXT)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):  # true and false among them
        return value if -_LARGEST <= value <= _LARGEST else None
    if isinstance(value, list):
        return [_plain(part, budget, depth + 1) for part in value[: max(budget[0], 0)]]
    if isinstance(value, dict):
        parts = list(value.items())[: max(budget[0], 0)]
        return {printable(key, 100): _plain(part, budget, depth + 1) for key, part in parts}
    return None
