"""A first token: what it is, and what a server may send before it."""

from __future__ import annotations

import pytest

from gpumesh.backends.continuation import continuation as continuation_module
from gpumesh.backends.continuation.continuation import Continuation

CHAT = "/v1/chat/completions"
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":null},"finish_reason":null}]}\n\n'
EMPTY = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":0}}\n\n'


def delta(members: bytes) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{' + members + b'},"finish_reason":null}]}\n\n'


def typed(kind: bytes, members: bytes = b"") -> bytes:
    return b"event: " + kind + b'\ndata: {"type":"' + kind + b'"' + members + b"}\n\n"


class StillClock:
    now = 1.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("path", "before", "token"),
    [
        (CHAT, [ROLE], delta(b'"content":"Hi"')),
        (CHAT, [EMPTY, USAGE], delta(b'"reasoning_content":"Hm"')),
        (CHAT, [ROLE], delta(b'"reasoning":"Hm"')),
        (CHAT, [ROLE], delta(b'"tool_calls":[{"index":0,"function":{"name":"f"}}]')),
        (CHAT, [ROLE], delta(b'"refusal":"No"')),
        (CHAT, [ROLE], b'data: {"choices":[{"index":1,"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'),
        (
            "/v1/completions",
            [b'data: {"choices":[{"index":0,"text":""}]}\n\n'],
            b'data: {"choices":[{"text":"x"}]}\n\n',
        ),
        ("/api/chat", [b'{"message":{"content":""},"done":false}\n', b"\n"], b'{"message":{"content":"x"}}\n'),
        ("/api/chat", [], b'{"message":{"content":"","thinking":"x"},"done":false}\n'),
        ("/api/chat", [], b'{"message":{"content":"","tool_calls":[{"function":{"name":"f"}}]},"done":false}\n'),
        ("/api/generate", [b'{"response":"","done":false}\n'], b'{"response":"x","done":false}\n'),
        ("/api/generate", [], b'{"completed":1,"total":9,"done":false}\n'),
        (
            "/v1/messages",
            [
                typed(b"message_start"),
                typed(b"ping"),
                typed(b"content_block_start", b',"content_block":{"type":"text"}'),
            ],
            typed(b"content_block_delta", b',"delta":{"text":"x"}'),
        ),
        (
            "/v1/messages",
            [typed(b"message_start")],
            typed(b"content_block_start", b',"content_block":{"type":"tool_use"}'),
        ),
        (
            "/v1/responses",
            [typed(b"response.created"), typed(b"response.in_progress"), typed(b"response.output_item.added")],
            typed(b"response.output_text.delta", b',"delta":"x"'),
        ),
        ("/v1/responses", [typed(b"response.created")], typed(b"response.a_type_of_tomorrow")),
    ],
)
def test_only_text_thinking_or_a_tool_call_is_a_first_token(path: str, before: list[bytes], token: bytes) -> None:
    comment = b"" if path.startswith("/api") else b": ping\n\n"
    answer = Continuation(path, b"{}", clock=StillClock())
    for frame in [comment, *before, comment]:
        assert answer.feed(frame) == b""
    assert answer.feed(token) == b"".join(frame for frame in before if frame.strip()) + token
    assert answer.feed(token) == token


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("/api/chat", b'{"message":{"content":""},"done":true,"done_reason":"load"}\n'),
        (CHAT, b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'),
        ("/v1/messages", typed(b"message_stop")),
        ("/v1/responses", typed(b"response.completed")),
    ],
)
def test_an_answer_without_a_token_ends_too(path: str, end: bytes) -> None:
    answer = Continuation(path, b"{}", clock=StillClock())
    assert answer.feed(end) == end
    assert answer.finished == (path != CHAT)


def test_comments_are_no_tokens_and_no_progress() -> None:
    clock = StillClock()
    answer = Continuation(CHAT, b"{}", clock=clock)
    token = delta(b'"content":"Hi"')
    assert answer.feed(token) is not token  # the first one is read
    assert answer.progress_at == clock.now
    assert answer.feed(token) is token  # the others are not
    assert answer.take_frame_count() == 2
    clock.now = 7.0
    for comment in (b":\n\n", b": ping\n\n", b":\r\n\r\n"):
        passed_on = answer.feed(comment)
        assert passed_on == comment, "proxies between may need it"
        assert passed_on is not comment, "so it is known to be no token"
    assert answer.progress_at == 1.0
    assert answer.take_frame_count() == 0
    assert answer.feed(token[:20]) == b""
    assert answer.progress_at == 7.0, "a part of a frame is on its way"
    assert answer.feed(token[20:]) == token


def test_the_time_of_an_answer_begins_with_its_first_token() -> None:
    clock = StillClock()
    answer = Continuation("/api/chat", b'{"model":"m","messages":[]}', clock=clock)
    answer.feed(b'{"message":{"content":""},"done":false}\n')
    clock.now = 9.0
    answer.feed(b'{"message":{"content":"x"},"done":false}\n')
    clock.now = 9.5
    answer.feed(b'{"message":{"content":"y"},"done":false}\n')
    assert answer.handle_cut() is None
    assert answer._partial_answer.spent_ms == 500.0


def test_what_is_held_before_the_first_token_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuation_module, "HELD_BYTES", 3 * len(ROLE))
    answer = Continuation(CHAT, b"{}", clock=StillClock())
    for _ in range(3):
        assert answer.feed(ROLE + b":\n\n") == b""
        assert answer.cut_reason is None
    assert answer.feed(ROLE) == b""
    assert "without a token" in (answer.cut_reason or "")
