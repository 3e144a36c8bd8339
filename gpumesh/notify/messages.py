"""Renders a message in the form that its receiver reads: JSON of our own, Slack, Discord, ntfy, or plain text. Pure.

The texts hold what hosts and servers have said. They are cut to a length that the receivers take, and their markup is
escaped, so that a host's name cannot make a link or call people (``@everyone``).
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from gpumesh.notify.outbox import PendingEvent
from gpumesh.text.printable import printable
from gpumesh.topology import EventKind, NotifyFormat

SCHEMA = "gpumesh.notify/1"
MAX_LINE_CHARS = 400
MAX_LINES = 12
DISCORD_CHARS = 1900  # Discord refuses more than 2,000
# ntfy's priorities go from 1 to 5; 3 is the usual one (https://docs.ntfy.sh/publish/).
_URGENT = (EventKind.ALL_DOWN, EventKind.HOST_KEY_CHANGED)


@dataclass(frozen=True, slots=True)
class Message:
    """Events that are told together. ``at`` is the time in UTC."""

    mesh: str
    at: datetime
    events: Sequence[PendingEvent]

    @property
    def title(self) -> str:
        """The message in a few words."""
        first = self.events[0].event
        title = f"{self.mesh}: {first.node} {first.kind}" if first.node is not None else f"{self.mesh}: {first.kind}"
        more = len(self.events) - 1
        return f"{title} and {more} more" if more else title

    @property
    def lines(self) -> list[str]:
        """A line for each event, without markup."""
        lines = [_render_line(pending) for pending in self.events[:MAX_LINES]]
        more = len(self.events) - MAX_LINES
        return [*lines, f"and {more} more"] if more > 0 else lines

    @property
    def text(self) -> str:
        """The whole message as plain text."""
        return "\n".join(f"{self.mesh}: {line}" for line in self.lines)


@dataclass(frozen=True, slots=True)
class HttpBody:
    """A body to post, and its headers."""

    content: bytes
    headers: tuple[tuple[str, str], ...]


def render_document(message: Message) -> dict[str, object]:
    """The message as a JSON document of the schema ``gpumesh.notify/1``."""
    events = [
        {
            "kind": str(pending.event.kind),
            "node": pending.event.node,
            "message": printable(pending.event.message, MAX_LINE_CHARS),
            "hint": None if pending.event.hint is None else printable(pending.event.hint, MAX_LINE_CHARS),
            "count": pending.count,
        }
        for pending in message.events
    ]
    at = message.at.isoformat(timespec="seconds").replace("+00:00", "Z")
    return {"schema": SCHEMA, "mesh": message.mesh, "at": at, "text": message.text, "events": events}


def render_http(message: Message, form: NotifyFormat) -> HttpBody:
    """The message as the body of a request to a webhook."""
    if form is NotifyFormat.NTFY:
        is_urgent = any(pending.event.kind in _URGENT for pending in message.events)
        # ntfy decodes no header, so a title beyond ASCII would be shown as question marks.
        title = message.title.encode("ascii", "replace").decode()
        headers = (("Title", title), ("Priority", "5" if is_urgent else "3"), ("Content-Type", "text/plain"))
        return HttpBody("\n".join(message.lines).encode(), headers)
    document: dict[str, object]
    match form:
        case NotifyFormat.SLACK:
            document = {"text": escape_markup(message.text)}
        case NotifyFormat.DISCORD:
            # ``allowed_mentions`` without entries: nothing in the text calls anybody.
            text = _escape_discord(message.text)[:DISCORD_CHARS]
            document = {"content": text, "allowed_mentions": {"parse": []}}
        case _:
            document = render_document(message)
    return HttpBody(json.dumps(document).encode(), (("Content-Type", "application/json"),))


def _render_line(pending: PendingEvent) -> str:
    event = pending.event
    hint = f" ({event.hint})" if event.hint else ""
    changes = f" — {pending.count} changes since the last message" if pending.count > 1 else ""
    return printable(f"{event.message}{hint}", MAX_LINE_CHARS) + changes


def escape_markup(text: str) -> str:
    """The three escapes of Slack (https://api.slack.com/reference/surfaces/formatting) and of desktop notifications
    (https://specifications.freedesktop.org/notification-spec)."""
    return html.escape(text, quote=False)


def _escape_discord(text: str) -> str:
    """Puts a backslash before each character of Discord's Markdown."""
    return "".join(f"\\{character}" if character in "\\*_~`|>[]()#<" else character for character in text)
