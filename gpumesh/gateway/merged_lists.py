"""Merges the lists of many nodes (models, loaded models) into one. Pure. The bodies of nodes are untrusted.

A client reads the merged list as one document. If one entry of one node is not readable (NaN, a date that no calendar
has, half of a surrogate pair), the client loses the entries of all nodes. So each entry is rebuilt from its readable
parts. A key that clients know has the right type or is left out. Other keys are passed on as far as their values are
plain JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from gpumesh.backends import model_list, safe_json
from gpumesh.text.model_names import full_name
from gpumesh.text.printable import printable

MAX_VALUES = 200  # values of unknown keys that are passed on, in one entry
MAX_TEXT_CHARS = 1000  # characters that are passed on of one text
MAX_LABEL_CHARS = 100  # of an unknown key, and of a text in a list (a family, a capability)
MAX_TEXTS = 50  # texts that are passed on of a list of texts
MAX_DEPTH = 4  # levels of nesting in the value of an unknown key
STEP_ENTRIES = 250  # entries that are read in one step, a few milliseconds
MAX_CLOCK_SKEW = timedelta(days=1)
_MAX_INT = (1 << 63) - 1
# RFC 3339, as the parsers of clients require it (Go's, for example).
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:Z|[+-][0-9]{2}:[0-9]{2})"
)
_NO_TIME = "0001-01-01T00:00:00Z"  # Go's zero time
_MIN_TIME = datetime.min.replace(tzinfo=UTC)

Entry = dict[str, Any]
Reader = Callable[[Any], Any]
"""Returns the value as clients expect it; ``None`` leaves the key out of the entry."""
SortTime = tuple[datetime, str]
"""A time, then its text. The text decides between times of the same microsecond: a datetime holds no nanoseconds."""


@dataclass(frozen=True, slots=True)
class ListFormat:
    """The format of a list.

    - ``key``: the key under which the document has the list. ``names``: the keys under which an entry has its name.
    - ``readers``: a function for each key that clients know, which reads its value.
    - ``time_key``: the key of an entry's time. If two entries have the same name, the later entry is kept; without a
      time key, the first. ``newest_first``: the list is sorted by this time.
    - ``head``: keys and values that come before the entries.
    """

    key: str
    names: tuple[str, ...]
    readers: Mapping[str, Reader]
    time_key: str | None = None
    newest_first: bool = False
    head: Mapping[str, str] = field(default_factory=dict)


class MergedList:
    """The entries of many nodes' lists. The time of an entry is removed if it is later than ``latest_time``: otherwise
    a host whose clock is wrong would always have the newest entry of a name."""

    def __init__(self, list_format: ListFormat, *, latest_time: datetime | None = None) -> None:
        self._format = list_format
        self._latest_time = latest_time
        self._entries: dict[str, tuple[SortTime, Entry]] = {}  # by the name in the form in which names are compared

    def add_body(self, body: bytes) -> Iterator[None]:
        """Adds one node's list in steps, and yields after each. Ignores a body that has no list, or a list of more than
        ``model_list.MAX_MODELS`` entries: the probes ignore such a body too."""
        list_format = self._format
        document = safe_json.parse_report(body)
        node_list = None if document is None else document.get(list_format.key)
        if not isinstance(node_list, list) or len(node_list) > model_list.MAX_MODELS:
            return
        yield
        entries_by_name = model_list.read_listing(node_list, *list_format.names).entries
        for number, (name, node_entry) in enumerate(entries_by_name.items(), 1):
            entry = _read_entry(name, node_entry, list_format)
            self._keep_later_entry(self._identify(name), entry)
            if number % STEP_ENTRIES == 0:
                yield

    def _identify(self, name: str) -> str:
        """The form in which names are compared. Ollama compares names without case, and adds a missing tag. Other
        servers compare names as they are."""
        is_ollama_list = self._format.time_key is not None  # only Ollama's lists have a time
        return full_name(name) if is_ollama_list else name

    def _keep_later_entry(self, identity: str, entry: Entry) -> None:
        """Adds an entry, unless one with this identity and the same or a later time is there already."""
        time = self._take_time(entry)
        if identity in self._entries:
            known_time, _ = self._entries[identity]
            if time <= known_time:
                return
        self._entries[identity] = (time, entry)

    def _take_time(self, entry: Entry) -> SortTime:
        """Returns the entry's time, and for an entry without a time the earliest time. Removes a time that is later
        than ``latest_time`` from the entry, which then counts as an entry without a time."""
        key = self._format.time_key
        if key is None:
            return _MIN_TIME, ""
        text = entry.get(key)
        time = safe_json.as_datetime(text) or _MIN_TIME
        if self._latest_time is not None and time > self._latest_time:
            del entry[key]
            return _MIN_TIME, ""
        return time, text or ""

    def add_names(self, names_by_model: Iterable[Sequence[str]]) -> None:
        """Lists models under all their names. ``names_by_model`` holds the names of each model: if the list has an
        entry for one of them, the others get a copy of the first such entry."""
        name_keys = self._format.names
        known = {full_name(entry[name_keys[0]]): (time, entry) for time, entry in self._entries.values()}
        for names in names_by_model:
            first_known = next((known[full_name(name)] for name in names if full_name(name) in known), None)
            if first_known is None:
                continue
            time, entry = first_known
            for name in names:
                if full_name(name) not in known:
                    self._entries[self._identify(name)] = (time, {**entry, **dict.fromkeys(name_keys, name)})

    def keep(self, is_kept: Callable[[str], bool]) -> None:
        """Removes all entries but those whose name ``is_kept`` accepts."""
        name_key = self._format.names[0]
        self._entries = {
            identity: (time, entry) for identity, (time, entry) in self._entries.items() if is_kept(entry[name_key])
        }

    def find(self, name: str) -> Entry | None:
        """The entry of this name; ``None`` if there is none."""
        name_key = self._format.names[0]
        entries = [entry for _, entry in self._entries.values()]
        return next((entry for entry in entries if full_name(entry[name_key]) == full_name(name)), None)

    def render(self) -> bytes:
        """The merged list as the body of a response."""
        times_and_entries = list(self._entries.values())
        if self._format.newest_first:
            times_and_entries.sort(key=lambda time_and_entry: time_and_entry[0], reverse=True)
        document = {**self._format.head, self._format.key: [entry for _, entry in times_and_entries]}
        return json.dumps(document, allow_nan=False).encode()


def merge_tags(bodies: Iterable[bytes], *, now: datetime | None = None) -> bytes:
    """The union of ``/api/tags`` by name, the newest first, as Ollama sorts them. If two entries have the same name,
    the newer entry is kept."""
    return _merge(MergedList(TAGS_FORMAT, latest_time=latest_plausible_time(now)), bodies)


def merge_loaded(bodies: Iterable[bytes]) -> bytes:
    """The union of ``/api/ps``. A model that several nodes have loaded is listed once, with the latest time at which it
    expires."""
    return _merge(MergedList(LOADED_FORMAT), bodies)


def merge_openai_models(bodies: Iterable[bytes]) -> bytes:
    """The union of ``/v1/models``, in the order in which the nodes first list the models."""
    return _merge(MergedList(OPENAI_FORMAT), bodies)


def latest_plausible_time(now: datetime | None) -> datetime | None:
    """The latest time that the clock of a host can show at ``now`` if it is not plainly wrong: a day of difference is
    allowed. ``None`` (no limit) without ``now``."""
    return None if now is None else now + MAX_CLOCK_SKEW


def _merge(merged: MergedList, bodies: Iterable[bytes]) -> bytes:
    """Adds the bodies to the list in one step, and returns the list as a body."""
    for body in bodies:
        for _ in merged.add_body(body):
            pass
    return merged.render()


def _read_entry(name: str, node_entry: Mapping[str, Any], list_format: ListFormat) -> Entry:
    """A new entry with this name and all readable values of a node's entry."""
    entry: Entry = dict.fromkeys(list_format.names, name)  # the node may have sent only one of the names
    budget = _ValueBudget()  # for all unknown keys of the entry together
    for key, value in node_entry.items():
        if key in list_format.names:
            continue
        reader = list_format.readers.get(key)
        if reader is None:
            entry_key, entry_value = printable(key, MAX_LABEL_CHARS), _plain_json(value, budget)
        else:
            entry_key, entry_value = key, reader(value)
        if entry_value is not None:
            entry[entry_key] = entry_value
    return entry


# -- readers of the keys that clients know; they return None for a value of another type -----------------------------


def _read_text(value: Any) -> str | None:
    return printable(value, MAX_TEXT_CHARS) if isinstance(value, str) else None


def _read_texts(value: Any) -> list[str] | None:
    """The first MAX_TEXTS values of a list, without those that are no texts."""
    if not isinstance(value, list):
        return None
    return [printable(text, MAX_LABEL_CHARS) for text in value[:MAX_TEXTS] if isinstance(text, str)]


def _read_count(value: Any) -> int | None:
    return safe_json.as_count(value)


def _read_time(value: Any) -> str | None:
    """The text of a time: unchanged if every parser reads it, rewritten if only Python's parser reads it. Go's zero
    time, which means "no time", stays as it is. ``None`` for any other value."""
    time = safe_json.as_datetime(value)
    if time is None:
        # ``as_datetime`` takes Go's zero time for no time. But Ollama sends it, and clients can read it.
        return _NO_TIME if value == _NO_TIME else None
    if _RFC3339.fullmatch(value):
        return str(value)
    return time.isoformat().replace("+00:00", "Z")


def _read_details(value: Any) -> Entry | None:
    """The ``details`` of a model in Ollama's lists: its family, its quantization and so on."""
    if not isinstance(value, dict):
        return None
    budget = _ValueBudget()  # for all unknown keys of the details together
    details: Entry = {}
    for key, detail in value.items():
        if key == "families":
            details[key] = _read_texts(detail)  # None is allowed: Ollama sends null here too
        elif key in _TEXT_DETAILS:
            if isinstance(detail, str):
                details[key] = printable(detail, MAX_TEXT_CHARS)
        else:
            plain_value = _plain_json(detail, budget)
            if plain_value is not None:
                details[printable(key, MAX_LABEL_CHARS)] = plain_value
    return details


def _read_object(_value: Any) -> str:
    return "model"  # the only value that OpenAI has


_TEXT_DETAILS = frozenset({"parent_model", "format", "family", "parameter_size", "quantization_level"})
_OLLAMA_READERS: Mapping[str, Reader] = {
    "size": _read_count,
    "size_vram": _read_count,
    "context_length": _read_count,
    "digest": _read_text,
    "modified_at": _read_time,
    "expires_at": _read_time,
    "details": _read_details,
    "capabilities": _read_texts,
    "remote_model": _read_text,
    "remote_host": _read_text,
}
_OPENAI_READERS: Mapping[str, Reader] = {"object": _read_object, "created": _read_count, "owned_by": _read_text}

TAGS_FORMAT = ListFormat("models", ("name", "model"), _OLLAMA_READERS, "modified_at", newest_first=True)
LOADED_FORMAT = ListFormat("models", ("name", "model"), _OLLAMA_READERS, "expires_at")
OPENAI_FORMAT = ListFormat("data", ("id",), _OPENAI_READERS, head={"object": "list"})


# -- other keys ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _ValueBudget:
    """How many values of unknown keys may still be copied."""

    remaining: int = MAX_VALUES


def _plain_json(value: Any, budget: _ValueBudget, depth: int = 0) -> Any:
    """A copy of the value, with ``None`` for each part that some JSON parser cannot read, and for each part beyond the
    limits. Each value that is copied takes one from the budget; ``depth`` is its level of nesting."""
    budget.remaining -= 1
    if budget.remaining < 0 or depth > MAX_DEPTH:
        return None
    if isinstance(value, str):
        return printable(value, MAX_TEXT_CHARS)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):  # or a bool
        return value if -_MAX_INT <= value <= _MAX_INT else None
    # The slices leave out the parts for which the budget has no room: a million of them must not become a million None.
    if isinstance(value, list):
        return [_plain_json(part, budget, depth + 1) for part in value[: budget.remaining]]
    if isinstance(value, dict):
        members = list(value.items())[: budget.remaining]
        return {printable(key, MAX_LABEL_CHARS): _plain_json(part, budget, depth + 1) for key, part in members}
    return None
