"""Names of models, by Ollama's rule: a name without a tag means ``:latest``, and case does not count. Pure."""

from __future__ import annotations


def full_name(model: str) -> str:
    """``qwen2.5`` -> ``qwen2.5:latest``. The port of a registry is no tag: ``host:5000/m`` is
    ``host:5000/m:latest``."""
    name = model.strip().lower()
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"
