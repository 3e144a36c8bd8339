"""``RecentLog``: the last lines of the mesh's log in memory, for the page. The whole log is in its file."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime

from gpumesh.text.printable import printable

MAX_LINES = 1000
MAX_MESSAGE_CHARS = 500


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of the log: its fields are those of a line of the file. ``node`` is ``None`` for a line about the whole
    mesh."""

    at: datetime
    level: str
    event: str
    node: str | None
    message: str


class RecentLog(logging.Handler):
    """Keeps the last ``MAX_LINES`` lines of the loggers to which it was added."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[LogLine] = deque(maxlen=MAX_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        node = getattr(record, "node", None)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # the arguments do not fit the text: a bug of ours, which must not raise here
            message = str(record.msg)
        line = LogLine(
            at=datetime.fromtimestamp(record.created, UTC),
            level=record.levelname.lower(),
            event=str(getattr(record, "event", record.name)),
            node=node if isinstance(node, str) else None,
            message=printable(message, MAX_MESSAGE_CHARS),
        )
        self._lines.append(line)

    def lines(self, node: str | None, count: int) -> list[LogLine]:
        """The last ``count`` lines about this node, the newest first; ``None``: about the mesh and all nodes."""
        self.acquire()  # other threads may log meanwhile
        try:
            newest_first = list(reversed(self._lines))
        finally:
            self.release()
        chosen = (line for line in newest_first if node is None or line.node == node)
        return [line for _, line in zip(range(count), chosen, strict=False)]
