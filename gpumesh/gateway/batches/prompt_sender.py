"""``PromptSender`` sends the prompts of batches that `gpumesh batch submit` has made of lines as those of `run -f`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from gpumesh.backends import safe_json
from gpumesh.backends.base import ChatRequest, Message
from gpumesh.balancer.base import Priority
from gpumesh.batches.measured_answer import read_measured_answer
from gpumesh.batches.prompt_lines import PromptEntry, read_prompt_line
from gpumesh.batches.values import BatchRequest, Reply
from gpumesh.mesh.chat import ChatStream
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.models.default_model import choose_model
from gpumesh.mesh.requests.answer import Answer

FIRST_REPORT_TIMEOUT_S = 4.0  # a slow node may hold up a prompt that names no model for so long


class PromptSender:
    """``on_answer_end`` gets each answer when it has ended, to count what it has used. ``clock``: in seconds."""

    def __init__(
        self, mesh: Mesh, on_answer_end: Callable[[Answer], None], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._mesh = mesh
        self._on_answer_end = on_answer_end
        self._clock = clock

    def __repr__(self) -> str:
        return f"<PromptSender {self._mesh.topology.name}>"

    async def send(self, request: BatchRequest) -> Reply:
        """Does what ``Sender.send`` promises for ``PROMPT_ENDPOINT``. Raises also BackendStatus if the server refuses
        the prompt, and UsageError for a prompt that this mesh cannot take: it names a node that is not in mesh.yaml, or
        no model where there are several."""
        entry = read_prompt_line(request.body.decode("utf-8", "replace"), f"line {request.line}")
        began = self._clock()
        chat = self._mesh.chat(
            ChatRequest(await self._find_model(entry), _make_messages(entry), entry.options),
            node=entry.node,
            priority=Priority.BATCH,
            session=request.session or None,
            timeout_s=request.timeout_s,
        )
        try:
            async with chat:
                return await self._read_reply(chat, began)
        finally:
            if chat.answer is not None:
                self._on_answer_end(chat.answer)

    async def _find_model(self, entry: PromptEntry) -> str:
        """The prompt's model, else the default model of mesh.yaml, else the only one of the mesh."""
        model = entry.model or self._mesh.topology.gateway.default_model
        if model is not None:
            return model
        return choose_model(await self._mesh.wait_first_report(FIRST_REPORT_TIMEOUT_S), entry.node)

    async def _read_reply(self, chat: ChatStream, began: float) -> Reply:
        """Reads the answer to its end. ``began``: by the clock."""
        answer = await read_measured_answer(chat, began=began, clock=self._clock)
        document: dict[str, Any] = {
            "response": answer.text,
            "node": chat.node,
            "attempts": chat.attempts,
            "ttft_ms": answer.ttft_ms,
            "total_ms": answer.total_ms,
            "tokens": answer.tokens,
            "tokens_per_s": answer.tokens_per_s,
            "error": None,
        }
        return Reply(200, safe_json.dump_compact(document), chat.node, chat.attempts)


def _make_messages(entry: PromptEntry) -> tuple[Message, ...]:
    messages = entry.messages or (Message("user", entry.text),)
    return messages if entry.system is None else (Message("system", entry.system), *messages)
