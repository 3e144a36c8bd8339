"""Names of models, by Ollama's rule (``types/model/name.go``). Pure.

A name without a tag means ``:latest``, a name without a namespace means ``library``, a name without a registry means
``registry.ollama.ai``, and case does not count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

# The parts of a name that Ollama adds to a name without them. Written out, they change nothing.
_DEFAULT_PREFIX = re.compile(
    r"(?:(?:https?://)?registry\.ollama\.ai/)?library/(?=[^/:][^/]*$)"  # before a name without a namespace
    r"|(?:https?://)?registry\.ollama\.ai/(?=.)"
)


@lru_cache(maxsize=512)  # every request passes here
def full_name(model: str) -> str:
    """Returns the name in lower case, with its tag, and without Ollama's own registry and namespace: ``Qwen2.5`` and
    ``registry.ollama.ai/library/qwen2.5`` give ``qwen2.5:latest``.

    The port of a registry is no tag: ``host:5000/m`` gives ``host:5000/m:latest``.
    """
    name = model.strip().lower()
    if "/" in name:
        prefix = _DEFAULT_PREFIX.match(name)
        if prefix is not None:
            name = name[prefix.end() :]
    _, _, last_part = name.rpartition("/")
    return name if ":" in last_part else f"{name}:latest"


def listed_spellings(names: Sequence[str]) -> Mapping[str, str]:
    """The listed name of a model, by this name and by its full name. Of names that differ only in their spelling, the
    first one counts for the other spellings."""
    return {full_name(name): name for name in reversed(names)} | {name: name for name in names}


def spelling_pattern(model: str) -> str:
    """A regular expression for all spellings of a model in lower case. ``model``: its full name."""
    name = model.removesuffix(":latest")
    tag = "(?::latest)?" if name != model else ""
    namespace = "" if "/" in name else "(?:library/)?"
    return rf"(?:(?:https?://)?registry\.ollama\.ai/)?{namespace}{re.escape(name)}{tag}"
