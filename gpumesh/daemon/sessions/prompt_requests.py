"""Makes the request for a prompt of a file (``batches/prompt_lines.py``)."""

from __future__ import annotations

from dataclasses import replace

from gpumesh.backends.base import Message
from gpumesh.batches.prompt_lines import PromptEntry
from gpumesh.daemon.sessions.session import PromptRequest


def make_request(entry: PromptEntry, common: PromptRequest, system: str | None) -> PromptRequest:
    """The prompt as a request. ``common`` and ``system``, the system prompt, are for the whole file, and fill in the
    fields that the prompt does not set."""
    messages = entry.messages or (Message("user", entry.text),)
    if entry.system is not None:
        system = entry.system
    if system is not None:
        messages = (Message("system", system), *messages)
    return replace(
        common,
        messages=messages,
        model=entry.model or common.model,
        node=entry.node or common.node,
        options={**common.options, **entry.options},
    )
