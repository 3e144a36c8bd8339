from __future__ import annotations

import json
from datetime import UTC, datetime

from gpumesh.notify.events import MeshEvent
from gpumesh.notify.messages import MAX_LINES, Message, render_document, render_http
from gpumesh.notify.outbox import PendingEvent
from gpumesh.topology import EventKind, NotifyFormat

AT = datetime(2026, 11, 30, 8, 0, tzinfo=UTC)
HOSTILE = "<!channel> @everyone [x](https://evil.example) \x1b[31mred & \u202ebad"


def message(*events: PendingEvent) -> Message:
    return Message("home", AT, events or (PendingEvent(MeshEvent(EventKind.NODE_DOWN, "a", "a is down", "look"), 1),))


def hostile() -> Message:
    return message(PendingEvent(MeshEvent(EventKind.NODE_DOWN, "a", HOSTILE), 1))


def test_our_own_json() -> None:
    body = render_http(message(), NotifyFormat.JSON)
    assert dict(body.headers) == {"Content-Type": "application/json"}
    assert json.loads(body.content) == {
        "schema": "gpumesh.notify/1",
        "mesh": "home",
        "at": "2026-11-30T08:00:00Z",
        "text": "home: a is down (look)",
        "events": [{"kind": "node-down", "node": "a", "message": "a is down", "hint": "look", "count": 1}],
    }


def test_several_changes_are_counted() -> None:
    flapping = message(PendingEvent(MeshEvent(EventKind.NODE_UP, "a", "a is back"), 7))
    assert flapping.text == "home: a is back — 7 changes since the last message"
    assert flapping.title == "home: a node-up"


def test_what_a_host_says_calls_nobody_and_makes_no_link() -> None:
    slack = json.loads(render_http(hostile(), NotifyFormat.SLACK).content)["text"]
    assert slack.startswith("home: &lt;!channel&gt; @everyone")
    discord = json.loads(render_http(hostile(), NotifyFormat.DISCORD).content)
    assert discord["allowed_mentions"] == {"parse": []}
    assert "\\[x\\]\\(https://evil.example\\)" in discord["content"]
    for text in (slack, discord["content"], json.dumps(render_document(hostile()), ensure_ascii=False)):
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_ntfy_gets_plain_text_and_a_title() -> None:
    body = render_http(message(), NotifyFormat.NTFY)
    assert body.content == b"a is down (look)"
    assert dict(body.headers) == {"Title": "home: a node-down", "Priority": "3", "Content-Type": "text/plain"}
    urgent = message(PendingEvent(MeshEvent(EventKind.ALL_DOWN, None, "no node of höme"), 1))
    assert dict(render_http(urgent, NotifyFormat.NTFY).headers)["Priority"] == "5"


def test_a_long_message_is_cut() -> None:
    many = message(*(PendingEvent(MeshEvent(EventKind.NODE_DOWN, f"n{n}", "x" * 5000), 1) for n in range(40)))
    assert len(many.lines) == MAX_LINES + 1
    assert many.lines[-1] == "and 28 more"
    assert len(json.loads(render_http(many, NotifyFormat.DISCORD).content)["content"]) <= 2000
    assert many.title == "home: n0 node-down and 39 more"
