"""A server's list of models, by names that can be shown. Pure.

The probes and the merged lists of the gateway read it alike: a model is known to the mesh by the name under which a
client finds it. A name that has to be cleaned for that (control characters, marks of direction, half of a surrogate
pair) is one that its server does not know, and what has none, or an endless one, is left out: both are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gpumesh.backends import safe_json
from gpumesh.printable import printable

# More are not read: they would be read every two seconds, and 10,000 take 100 ms, in which nobody else has a turn.
MAX_MODELS = 4_000
LONGEST_NAME = 200
MAX_CONTEXT_TOKENS = 1 << 31
# Models in memory at once that are read: each is a row, a label of /metrics and part of a node's reason.
MAX_LOADED_MODELS = 256


@dataclass(frozen=True, slots=True)
class Listing:
    """Entries by name, as the server orders them; of several with one name the first. ``unusable`` counts those that
    cannot be asked for."""

    entries: Mapping[str, Mapping[str, Any]]
    unusable: int = 0

    def first_entries(self, count: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        return islice(self.entries.items(), count)


def clean_name(value: str | None) -> str | None:
    """A model's name as it can be shown; ``None`` for none, and for an endless one."""
    if value is None or len(value) > LONGEST_NAME:
        return None
    return printable(value, LONGEST_NAME) or None


def read_listing(entries: Any, *names: str, key: Callable[[str], str] = str) -> Listing:
    """The objects of a list, by the first of the keys ``names`` that holds a text; ``key`` gives the same for names
    that mean one model. Anything that is no list is an empty one."""
    named: dict[str, Mapping[str, Any]] = {}
    seen: set[str] = set()
    unusable = 0
    for entry in safe_json.as_objects(entries):
        listed_name = next((text for key_name in names if (text := safe_json.as_text(entry.get(key_name)))), None)
        name = clean_name(listed_name)
        unusable += name is None or name != listed_name
        if name is not None and (same := key(name)) not in seen:
            seen.add(same)
            named[name] = entry
    return Listing(named, unusable)
