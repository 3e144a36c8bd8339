"""A stand-in inference server that writes down what it really did: the truth beside which bench_truth.py puts figures.

    python benchmarks/truth_server.py SPEC.json LOG.jsonl

It prints its port and runs until its standard input is closed. ``SPEC.json`` has the fields of ``ServerSpec``. Each
answer adds a line to ``LOG.jsonl`` with the fields of ``ServedAnswer``; its times are of the system's monotonic clock,
which is the same for all processes. The counters in its answers may lie or be missing; the log never does.

The clock of the counters is that of llama-server: the prompt ends, and the generation starts, with the first token.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

MODEL = "truth:7b"
TEMPLATE_TOKENS = 12  # tokens of every prompt that are not words of its text


@dataclass(frozen=True)
class ServerSpec:
    """How the server behaves. ``…_every``: which answers are affected, such as every third one; 0: none.

    ``per_piece``: tokens in a frame. ``thinking``: how many of the first tokens are thinking. ``hidden``: how many of
    the first tokens are not sent. ``stall_s``: a pause of the generation, in its middle. ``hold_s``: all frames from
    the middle on are sent so much later than they are generated. ``cold_s``: a load of the model. ``stop_after``: the
    model ends each answer after so many tokens. ``context``: longer prompts are cut. ``clock`` multiplies all durations
    in the counters. ``absurd``: the duration of the generation is 1 ns. ``without``: counters that are left out.
    """

    api: str = "ollama"
    slots: int = 1
    tokens_per_s: float = 20.0
    prefill_tokens_per_s: float = 100.0
    per_piece: int = 1
    thinking: int = 0
    hidden: int = 0
    stall_every: int = 0
    stall_s: float = 0.0
    hold_every: int = 0
    hold_s: float = 0.0
    cold_every: int = 0
    cold_s: float = 0.0
    stop_after: int = 0
    context: int = 0
    clock: float = 1.0
    absurd: bool = False
    without: tuple[str, ...] = ()


@dataclass
class ServedAnswer:
    """What happened. Times are in seconds of the monotonic clock. ``generated_at`` has the time of each token,
    ``sent_at`` of each frame with text."""

    received_at: float
    load_s: float
    queued_s: float
    prefill_s: float
    prompt_tokens: int
    generated_at: list[float]
    sent_at: list[float]
    ended_at: float


class TruthServer:
    """Answers one model. All of its handlers run in one event loop."""

    def __init__(self, spec: ServerSpec, log: Path) -> None:
        self._spec = spec
        self._log = log
        self._slots = asyncio.Semaphore(spec.slots)
        self._answers = 0

    def make_app(self) -> web.Application:
        app = web.Application()
        if self._spec.api == "ollama":
            app.router.add_get("/api/version", self.version)
            app.router.add_get("/api/tags", self.models)
            app.router.add_get("/api/ps", self.models)
            app.router.add_post("/api/chat", self.chat)
        else:
            app.router.add_get("/v1/models", self.models)
            app.router.add_post("/v1/chat/completions", self.chat)
        return app

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.33.0"})

    async def models(self, _: web.Request) -> web.Response:
        if self._spec.api == "ollama":
            return web.json_response(
                {"models": [{"name": MODEL, "model": MODEL, "size": 1 << 30, "size_vram": 1 << 30}]}
            )
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "truth"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        spec, received_at = self._spec, time.monotonic()
        body = await request.json()
        number, self._answers = self._answers, self._answers + 1
        words = sum(len(message["content"].split()) for message in body["messages"])
        prompt_tokens = min(words + TEMPLATE_TOKENS, spec.context or sys.maxsize)
        wanted = body["options"]["num_predict"] if spec.api == "ollama" else body["max_tokens"]
        tokens = min(wanted, spec.stop_after or wanted)
        if _is_hit(number, spec.cold_every):
            await asyncio.sleep(spec.cold_s)
        loaded_at = time.monotonic()
        async with self._slots:
            started_at = time.monotonic()
            await asyncio.sleep(prompt_tokens / spec.prefill_tokens_per_s)
            answer = ServedAnswer(
                received_at, loaded_at - received_at, started_at - loaded_at, 0.0, prompt_tokens, [], [], 0.0
            )
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await self._generate(request, response, answer, tokens, number)
            reason = "length" if tokens == wanted else "stop"
            answer.prefill_s = answer.generated_at[0] - started_at
            answer.ended_at = time.monotonic()
            await response.write(self._final_frames(answer, reason))
        await response.write_eof()
        with self._log.open("a") as log:
            log.write(json.dumps(asdict(answer)) + "\n")
        return response

    async def _generate(
        self, request: web.Request, response: web.StreamResponse, answer: ServedAnswer, tokens: int, number: int
    ) -> None:
        """Generates the tokens, each at its time, and sends the frames."""
        spec, start_at = self._spec, time.monotonic()
        stall_s = spec.stall_s if _is_hit(number, spec.stall_every) else 0.0
        hold_s = spec.hold_s if _is_hit(number, spec.hold_every) else 0.0
        unsent = 0
        for index in range(tokens):
            in_second_half = index >= tokens // 2
            due_at = start_at + index / spec.tokens_per_s + (stall_s if in_second_half else 0.0)
            held_until = due_at + (hold_s if in_second_half else 0.0)
            await asyncio.sleep(max(held_until - time.monotonic(), 0.0))
            now = time.monotonic()
            answer.generated_at.append(now - (hold_s if in_second_half else 0.0))
            if index < spec.hidden:
                continue
            unsent += 1
            if unsent == spec.per_piece or index == tokens - 1:
                if not answer.sent_at:
                    await response.prepare(request)
                answer.sent_at.append(now)
                await response.write(self._frame("word " * unsent, thinks=index < spec.thinking))
                unsent = 0

    def _frame(self, text: str, *, thinks: bool) -> bytes:
        if self._spec.api == "ollama":
            message = {"role": "assistant", "content": "" if thinks else text, "thinking": text if thinks else ""}
            return json.dumps({"model": MODEL, "message": message, "done": False}).encode() + b"\n"
        delta = {"reasoning_content" if thinks else "content": text}
        return _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def _final_frames(self, answer: ServedAnswer, reason: str) -> bytes:
        """The frames with the reason and the counters, which may lie."""
        spec = self._spec
        eval_s = answer.generated_at[-1] - answer.generated_at[0]
        held_s = answer.sent_at[-1] - answer.generated_at[-1] if answer.sent_at else 0.0
        total_s = answer.ended_at - answer.received_at - held_s  # what is held up is on its way already
        if spec.api == "ollama":
            counters: dict[str, Any] = {
                "total_duration": round(total_s * spec.clock * 1e9),
                "load_duration": round(answer.load_s * spec.clock * 1e9),
                "prompt_eval_count": answer.prompt_tokens,
                "prompt_eval_duration": round(answer.prefill_s * spec.clock * 1e9),
                "eval_count": len(answer.generated_at),
                "eval_duration": 1 if spec.absurd else round(eval_s * spec.clock * 1e9),
            }
            given = {name: value for name, value in counters.items() if name not in spec.without}
            message = {"role": "assistant", "content": ""}
            frame = {"model": MODEL, "message": message, "done": True, "done_reason": reason, **given}
            return json.dumps(frame).encode() + b"\n"
        frames = _event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        if "usage" not in spec.without:
            usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.generated_at)}
            frames += _event({"choices": [], "usage": usage})
        return frames + b"data: [DONE]\n\n"


def _is_hit(number: int, every: int) -> bool:
    """Whether this answer, counted from 0, is one of every so many. Never the first one."""
    return every > 0 and number % every == every - 1


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


async def serve(spec: ServerSpec, log: Path) -> None:
    runner = web.AppRunner(TruthServer(spec, log).make_app(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    gc.freeze()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(ServerSpec(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])))
