"""``Ending``: how an answer ends that no node continues."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of an answer that no node continues: ``data`` completes it, or ``error`` says why it stays incomplete."""

    data: bytes = b""
    error: str | None = None
