"""One list out of many nodes' lists. Pure; what a node sent is hostile until it was parsed here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gpumesh.backends import jsons
from gpumesh.backends.refusals import MOST_MODELS
from gpumesh.balancer.select import full_name


def tags(bodies: Iterable[bytes]) -> bytes:
    """The union of ``/api/tags`` by name, newest first as Ollama lists them; of two entries the newer one stands."""
    found: dict[str, dict[str, Any]] = {}
    for entry in _entries(bodies, "models", "name"):
        key = full_name(entry["name"])
        if key not in found or _text(entry, "modified_at") > _text(found[key], "modified_at"):
            found[key] = entry
    listed = sorted(found.values(), key=lambda entry: _text(entry, "modified_at"), reverse=True)
    return json.dumps({"models": listed}).encode()


def loaded(bodies: Iterable[bytes]) -> bytes:
    """The union of ``/api/ps``; a model in the memory of several nodes is listed once, as it lasts longest."""
    found: dict[str, dict[str, Any]] = {}
    for entry in _entries(bodies, "models", "name"):
        key = full_name(entry["name"])
        if key not in found or _text(entry, "expires_at") > _text(found[key], "expires_at"):
            found[key] = entry
    return json.dumps({"models": list(found.values())}).encode()


def openai_models(bodies: Iterable[bytes]) -> bytes:
    """The union of ``/v1/models``, in the order of first mention."""
    found: dict[str, dict[str, Any]] = {}
    for entry in _entries(bodies, "data", "id"):
        found.setdefault(entry["id"], entry)
    return json.dumps({"object": "list", "data": list(found.values())}).encode()


def _entries(bodies: Iterable[bytes], key: str, name: str) -> Iterable[dict[str, Any]]:
    for body in bodies:
        document = jsons.parse(body)
        entries = document.get(key) if isinstance(document, Mapping) else None
        for entry in jsons.objects(entries, MOST_MODELS):
            if isinstance(entry.get(name), str):
                yield entry


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    return value if isinstance(value, str) else ""
