"""Drives a continuation as a proxy does, against a model that a test scripts; and reads what the client gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gpumesh.backends.base import Chunk, HttpCall
from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.continuation.ending import Ending
from gpumesh.backends.continuation.planner import ContinuationStrategies
from gpumesh.backends.dialects import DIALECTS
from gpumesh.topology import BackendKind
from tests.backends.models import ModelServer

OLLAMA = BackendKind.OLLAMA
Cuts = Sequence[int]


class Clock:
    now = 50.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def start_answer(call: HttpCall, strategies: ContinuationStrategies | None = None, **more: Any) -> Continuation:
    return Continuation(call.path, call.body, clock=Clock(), strategies=strategies, **more)


def continue_on_node(answer: Continuation, server: ModelServer, reason: str | None = None) -> HttpCall | Ending:
    """From the cut to the next call, as a proxy does it."""
    ending = answer.handle_cut(reason)
    if ending is not None:
        return ending
    ask_all(answer, server)
    step = answer.next_call("n", OLLAMA)
    assert step is not None
    return step


def ask_all(answer: Continuation, server: ModelServer, kind: BackendKind = OLLAMA) -> list[HttpCall]:
    """Asks the node each question about how it continues. Returns the questions."""
    asked: list[HttpCall] = []
    while (question := answer.next_question("n", kind)) is not None:
        asked.append(question)
        answer.apply_reply(*server.reply(question))
    return asked


def drive(
    answer: Continuation, call: HttpCall, server: ModelServer, cuts: Cuts, *, piece: int = 1 << 20, first: bytes = b""
) -> bytes:
    """The client's bytes when the n-th upstream is cut after ``cuts[n]`` bytes; each comes in pieces of ``piece``.

    ``first``: what the first one sends, if that was made before.
    """
    out = b""
    left = list(cuts)
    while True:
        stream, first = first or server.stream(call), b""
        if left:
            stream = stream[: left.pop(0)]
        for start in range(0, len(stream), piece):
            out += answer.feed(stream[start : start + piece])
        if answer.finished:
            return out
        step = continue_on_node(answer, server)
        if isinstance(step, Ending):
            assert step.error is None, step.error
            return out + step.data
        call = step


def chunks(call: HttpCall, data: bytes) -> list[Chunk]:
    """As a client reads them. Raises for an answer that is not whole."""
    reader = DIALECTS[BackendKind.OPENAI if call.path.startswith("/v1") else OLLAMA].create_reader(stream=True)
    return [*reader.feed(data), *reader.close()]


def text(call: HttpCall, data: bytes) -> str:
    return "".join(chunk.text for chunk in chunks(call, data))


def final(call: HttpCall, data: bytes) -> dict[str, Any]:
    """The last frame that is JSON."""
    lines = [line.removeprefix(b"data: ") for line in data.splitlines() if line.strip()]
    documents: list[dict[str, Any]] = [json.loads(line) for line in lines if line != b"[DONE]"]
    return documents[-1]


def check_whole(call: HttpCall, data: bytes, uncut: bytes) -> bool:
    """Text and figures are those of the answer that was never cut; there is one final frame, and it is the last.

    Returns whether there are figures: cut right before it, OpenAI's frame of usage is known to nobody.
    """
    received = chunks(call, data)
    assert "".join(chunk.text for chunk in received) == text(call, uncut)
    assert [chunk.done for chunk in received].count(True) == 1
    assert received[-1].done
    assert data.count(b"data: [DONE]") == call.path.startswith("/v1")
    expected, counted = chunks(call, uncut)[-1], received[-1]
    assert counted.done_reason == expected.done_reason
    assert expected.counters is not None
    if counted.counters is None:
        assert b'"usage"' not in data
        return False
    assert counted.counters.tokens == expected.counters.tokens
    assert counted.counters.prompt_tokens == expected.counters.prompt_tokens
    return True
