"""The mesh's log file: one JSON object a line, rotated, readable by this user only.

Each line has ``at``, ``level``, ``event``, ``node``, ``message``, and ``trace`` where there is one. Prompts and answers
are never in it. ``state_changes.py`` makes the events.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import traceback
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

from gpumesh.daemon.state_changes import LogEvent

ROTATE_BYTES = 2 << 20  # the size at which a new file begins
ROTATED_FILES = 3  # the number of old files that are kept


class JsonLinesFormatter(logging.Formatter):
    """Turns each log record into a JSON object on one line; the trace of an error goes into ``trace``."""

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


class _PrivateFileHandler(logging.handlers.RotatingFileHandler):
    """Opens each file with mode 0600, also after a rotation."""

    def _open(self) -> TextIOWrapper:
        """Opens the file so that only its owner can read it."""
        file: Any = open(  # noqa: SIM115 - the handler closes it
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            errors=self.errors,
            opener=lambda name, flags: os.open(name, flags, 0o600),
        )
        return cast("TextIOWrapper", file)


def start_log(path: Path) -> logging.Handler:
    """Sends everything that gpumesh and asyncio log in this process to this file, until ``stop_log`` gets the returned
    handler."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = _PrivateFileHandler(
        path, maxBytes=ROTATE_BYTES, backupCount=ROTATED_FILES, encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(JsonLinesFormatter())
    logger = logging.getLogger("gpumesh")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logging.getLogger("asyncio").addHandler(handler)
    logger.propagate = False  # a handler of the root logger could write the same lines into the table on the terminal
    return handler


def stop_log(handler: logging.Handler) -> None:
    """Ends what ``start_log`` began, and closes the file."""
    logging.getLogger("gpumesh").removeHandler(handler)
    logging.getLogger("asyncio").removeHandler(handler)
    logging.getLogger("gpumesh").propagate = True
    handler.close()


def log_event(event: LogEvent) -> None:
    """Writes a change of the mesh's state to the log."""
    extra = {"event": event.event, "node": event.node}
    logging.getLogger("gpumesh.journal").log(event.level, "%s", event.message, extra=extra)
