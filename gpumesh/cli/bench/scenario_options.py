"""Reads the options of `bench run` that only one scenario has: those of ``overhead`` and ``failover``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpumesh.errors import UsageError


def parse_direct_urls(texts: Sequence[str]) -> Mapping[str, str]:
    """The URLs of ``--direct NODE=URL``, by the node's name. Raises UsageError for any other text."""
    urls: dict[str, str] = {}
    for text in texts:
        node, _, url = text.partition("=")
        if not node or not url.startswith(("http://", "https://")):
            raise UsageError(f"--direct {text!r} is not NODE=URL", hint="e.g. --direct iceland=http://10.0.0.5:11434")
        urls[node] = url.rstrip("/")
    return urls
