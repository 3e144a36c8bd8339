"""The mesh's log: what changed, as structured lines. Pure but for ``JsonLinesFormatter``, which writes them.

One JSON object a line: ``at``, ``level``, ``event``, ``node``, ``message``, and what belongs to the event. Prompts and
answers never stand in it.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

from gpumesh.state import BackendPhase, Finding, Health, MeshState, NodeState, TunnelPhase, TunnelState

ROTATE_BYTES = 2 << 20
ROTATED_FILES = 3

_BAD = (Health.DOWN, Health.DEGRADED)


@dataclass(frozen=True, slots=True)
class LogEvent:
    level: int
    event: str
    node: str | None
    message: str


def compare_states(old: MeshState | None, new: MeshState) -> Iterator[LogEvent]:
    """What a person would want to know that happened between two snapshots."""
    before = {node.name: node for node in old.nodes} if old is not None else {}
    for node in new.nodes:
        yield from _node_changes(before.get(node.name), node)
    known = {_key(finding) for finding in old.findings} if old is not None else set()
    for finding in new.findings:
        if _key(finding) not in known:
            yield LogEvent(logging.WARNING, f"finding {finding.code}", finding.node, finding.message)


def _key(finding: Finding) -> tuple[str, str | None]:
    return (finding.code, finding.node)


def _node_changes(old: NodeState | None, new: NodeState) -> Iterator[LogEvent]:
    was, now = (old.tunnel if old is not None else None), new.tunnel
    if (was is None or was.state is not now.state) and not _only_another_try(was, now):
        reason = f": {now.last_error}" if now.last_error and now.state is not TunnelPhase.UP else ""
        bad = now.state in (TunnelPhase.BACKOFF, TunnelPhase.FAILED)
        yield LogEvent(
            logging.WARNING if bad else logging.INFO, f"tunnel {now.state}", new.name, f"tunnel {now.state}{reason}"
        )
    backend_was = old.backend.state if old is not None else BackendPhase.UNKNOWN
    if backend_was is not new.backend.state:
        detail = new.backend.last_error or new.backend.url or ""
        bad = new.backend.state is BackendPhase.DOWN
        text = f"{new.backend.kind} {new.backend.state}" + (f": {detail}" if detail else "")
        yield LogEvent(logging.WARNING if bad else logging.INFO, f"backend {new.backend.state}", new.name, text)
    health_was = old.health if old is not None else Health.UNKNOWN
    if health_was is not new.health:
        text = f"{health_was} -> {new.health}" + (f": {new.reason}" if new.reason else "")
        yield LogEvent(logging.WARNING if new.health in _BAD else logging.INFO, f"health {new.health}", new.name, text)


def _only_another_try(was: TunnelState | None, now: TunnelState) -> bool:
    """A host that is away is tried again and again: it is told once, and then only when the reason is another."""
    if now.state is TunnelPhase.IDLE:
        return True
    if now.state is TunnelPhase.CONNECTING:
        return was is not None and was.state in (TunnelPhase.BACKOFF, TunnelPhase.FAILED)
    trying = was is not None and was.state is TunnelPhase.CONNECTING
    return trying and now.state is not TunnelPhase.UP and was is not None and was.last_error == now.last_error


class JsonLinesFormatter(logging.Formatter):
    """Records as JSON objects, one a line; a trace goes into ``trace``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            "node": getattr(record, "node", None),
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["trace"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line)


class _Private(logging.handlers.RotatingFileHandler):
    """For this user's eyes alone, also after it was rotated."""

    def _open(self) -> TextIOWrapper:
        opened: Any = open(  # noqa: SIM115 - its handler closes it
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            errors=self.errors,
            opener=lambda name, flags: os.open(name, flags, 0o600),
        )
        return cast("TextIOWrapper", opened)


def start_log(path: Path) -> logging.Handler:
    """All that gpumesh logs in this process goes to this file from now on, rotated; for this user's eyes alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = _Private(
        path, maxBytes=ROTATE_BYTES, backupCount=ROTATED_FILES, encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(JsonLinesFormatter())
    logger = logging.getLogger("gpumesh")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logging.getLogger("asyncio").addHandler(handler)
    logger.propagate = False
    return handler


def stop_log(handler: logging.Handler) -> None:
    logging.getLogger("gpumesh").removeHandler(handler)
    logging.getLogger("asyncio").removeHandler(handler)
    logging.getLogger("gpumesh").propagate = True
    handler.close()


def log_event(event: LogEvent) -> None:
    extra = {"event": event.event, "node": event.node}
    logging.getLogger("gpumesh.journal").log(event.level, "%s", event.message, extra=extra)
