"""Names of models, by Ollama's rule: a name without a tag means ``:latest``, and case does not count. Pure."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=512)  # every request passes here
def full_name(model: str) -> str:
    """Returns the name in lower case and with its tag: ``Qwen2.5`` gives ``qwen2.5:latest``.

    The port of a registry is no tag: ``host:5000/m`` gives ``host:5000/m:latest``.
    """
    name = model.strip().lower()
    _, _, last_part = name.rpartition("/")
    return name if ":" in last_part else f"{name}:latest"
