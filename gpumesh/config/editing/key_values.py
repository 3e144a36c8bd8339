"""Reads the words ``key=value`` of `gpumesh node edit`, such as ``ssh.port=17446`` and ``expect.models=[a, b]``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from gpumesh.config.editing.edit import Edit, EditValue
from gpumesh.errors import UsageError

_KEY = re.compile(r"[A-Za-z0-9_.-]+")


def read_edits(words: Sequence[str]) -> list[Edit]:
    """The edits of a node, whose index is not known yet: it is 0 in them. A value is read as in mesh.yaml: ``2`` is a
    number, ``false`` a switch, ``[a, b]`` a list. Raises UsageError for any other word."""
    return [_read_edit(word) for word in words]


def _read_edit(word: str) -> Edit:
    """Reads KEY=VALUE: the path of the key, and the value as YAML reads it. Raises UsageError."""
    key, equals, text = word.partition("=")
    path = tuple(key.split("."))
    if path[0] == "labels" and len(path) > 2:
        path = ("labels", ".".join(path[1:]))  # a label's name may have dots
    if not equals or not _KEY.fullmatch(key) or not all(path):
        raise UsageError(f"{word!r} is no KEY=VALUE", hint="for example ssh.port=17446, weight=2, enabled=false")
    value = _read_value(text)
    if value is None:
        raise UsageError(
            f"{key} needs one value: a text, a number, true or false, or a list such as [a, b]",
            hint="without KEY=VALUE your editor opens the node's part of mesh.yaml",
        )
    if path[0] == "labels":
        value = text  # labels are texts
    return Edit(0, path, value)


def _read_value(text: str) -> EditValue | None:
    """The value that mesh.yaml would read; ``None`` for a mapping, for ``null``, and for nothing. A text that
    YAML would take for something else than text, a number or a switch (a date, ``a: b``) stays text."""
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text if text.strip() and "\n" not in text else None
    if isinstance(value, list):
        return tuple(map(str, value)) if all(isinstance(member, (str, int, float)) for member in value) else None
    if isinstance(value, (bool, int, float)):
        return value
    return None if value is None or isinstance(value, dict) or "\n" in text else text
