"""Reads a server's list of models, by names that are safe to show. Pure.

The probes and the merged lists of the gateway read the list in the same way: the mesh knows a model by the name under
which a client finds it. Two sorts of entries are counted as unusable. If a name must be cleaned (control characters,
marks of direction, half of a surrogate pair), the entry stays in the list, but its server does not know the clean name.
An entry without a name, or with a name that is too long, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gpumesh.backends import safe_json
from gpumesh.text.printable import printable

# A longer list is not read. Each probe, every two seconds, reads the list: 10,000 models would take 100 ms, in which
# the event loop does nothing else.
MAX_MODELS = 4_000
LONGEST_NAME = 200  # characters; a model with a longer name is left out
MAX_CONTEXT_TOKENS = 1 << 31  # a larger context is not believed
# If more models are in memory at once, only the first are read: each model is a row of tables, a label of /metrics and
# a part of the reason of a node's state.
MAX_LOADED_MODELS = 256


@dataclass(frozen=True, slots=True)
class Listing:
    """The entries of a list of models by name, in the server's order. If several entries have the same name, only the
    first is kept.

    ``unusable`` counts the entries whose name no request could use.
    """

    entries: Mapping[str, Mapping[str, Any]]
    unusable: int = 0

    def first_entries(self, count: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yields at most ``count`` names with their entries."""
        return islice(self.entries.items(), count)


def clean_name(value: str | None) -> str | None:
    """A model's name as it can be shown; ``None`` for a missing name, and for a name that is too long."""
    if value is None or len(value) > LONGEST_NAME:
        return None
    return printable(value, LONGEST_NAME) or None


def read_listing(entries: Any, *name_keys: str, identity: Callable[[str], str] = str) -> Listing:
    """Reads the objects of a list by their names. Anything but a list is read as an empty list.

    ``name_keys``: the keys that may hold the name; the first of them that holds a text is used. ``identity`` returns
    the same value for all names of one model, as ``full_name`` does for ``llama3`` and ``llama3:latest``.
    """
    entries_by_name: dict[str, Mapping[str, Any]] = {}
    seen_identities: set[str] = set()
    unusable = 0
    for entry in safe_json.as_objects(entries):
        listed_name = _find_first_text(entry, name_keys)
        name = clean_name(listed_name)
        had_to_be_cleaned = name != listed_name
        if name is None or had_to_be_cleaned:
            unusable += 1
        if name is not None and identity(name) not in seen_identities:
            seen_identities.add(identity(name))
            entries_by_name[name] = entry
    return Listing(entries_by_name, unusable)


def _find_first_text(entry: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """The first text that is not empty under one of the keys; ``None`` if there is none."""
    texts = (safe_json.as_text(entry.get(key)) for key in keys)
    return next((text for text in texts if text), None)
