"""What a server with a simulated model answers, as bytes: the lab's own text and frames, without a network."""

from __future__ import annotations

import json
from typing import Any

from gpumesh.backends.base import HttpCall
from gpumesh.lab import profile
from gpumesh.lab.answers import GenerationRequest, PlannedAnswer, plan_answer, render_request
from gpumesh.lab.inference.engine import Timings
from gpumesh.lab.profile import ModelProfile
from gpumesh.lab.servers.chat_frames import ChatFrames
from gpumesh.lab.servers.native_frames import NativeFrames

EVAL_NS = 10_000_000


class ModelServer:
    """``continues``: whether the model's template continues a last message of the assistant. ``repeats``: whether the
    server then sends this message once more before the new text. ``renders``: whether the server is new enough to show
    a rendered prompt. ``calls`` are those that it was sent."""

    def __init__(
        self,
        *,
        continues: bool = True,
        repeats: bool = False,
        thinking: bool = False,
        renders: bool = True,
        tokens: int = 8,
    ) -> None:
        self.repeats = repeats
        self.model = ModelProfile("m:latest", continues=continues, thinking=thinking)
        self.host = profile.make_host("test", answer_tokens=(tokens, tokens))
        self.renders = renders
        self.calls: list[HttpCall] = []

    def frames(self, call: HttpCall) -> list[bytes]:
        """The whole stream, frame by frame."""
        self.calls.append(call)
        body = json.loads(call.body)
        work = self._work(call.path, body)
        said = plan_answer(work, self.host)
        frames = self._frames(call.path, body)
        timings = Timings(
            total_ns=said.total * EVAL_NS,
            prompt_tokens=len(said.prompt.split()),
            tokens=said.total,
            eval_ns=said.total * EVAL_NS,
        )
        parts = [frames.encode_piece("", token, None) for token in said.thinking]
        texts = list(said.tokens)
        messages = body.get("messages") or [{}]
        if self.repeats and messages[-1].get("role") == "assistant":  # as llama-server: with the first new token
            texts = [messages[-1]["content"] + "".join(texts[:1]), *texts[1:]]
        parts += [frames.encode_piece(token, "", None) for token in texts]
        return [*parts, frames.encode_final(said.done_reason, timings)]

    def stream(self, call: HttpCall) -> bytes:
        return b"".join(self.frames(call))

    def script(self, call: HttpCall) -> PlannedAnswer:
        return plan_answer(self._work(call.path, json.loads(call.body)), self.host)

    def reply(self, call: HttpCall) -> tuple[int, bytes]:
        """Status and body of the answer to ``Continuation.next_question``."""
        body = json.loads(call.body)
        if "_debug_render_only" not in body:
            return 200, self.stream(call)
        self.calls.append(call)
        assert call.path == "/api/chat"
        assert body["_debug_render_only"] is True
        if not self.renders:
            return 200, b'{"model":"m","message":{"role":"assistant","content":"x"},"done":true,"done_reason":"length"}'
        template = render_request(self._work(call.path, body))
        return 200, json.dumps({"model": "m", "_debug_info": {"rendered_template": template}}).encode()

    def _work(self, path: str, body: dict[str, Any]) -> GenerationRequest:
        options = dict(body.get("options") or {})
        prompt = None
        messages = body.get("messages")
        if path == "/v1/chat/completions":
            limit = body.get("max_tokens") or body.get("max_completion_tokens")
            options = {"num_predict": limit, "seed": body.get("seed"), "stop": body.get("stop")}
        elif path == "/api/generate" and body.get("raw"):
            prompt = body["prompt"]
        elif path == "/api/generate":
            system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
            messages = [*system, {"role": "user", "content": body["prompt"]}]
        return GenerationRequest(self.model, body["model"], messages=messages, prompt=prompt, options=options)

    def _frames(self, path: str, body: dict[str, Any]) -> NativeFrames | ChatFrames:
        if path == "/v1/chat/completions":
            return ChatFrames(body["model"], usage=bool((body.get("stream_options") or {}).get("include_usage")))
        return NativeFrames(body["model"], chat=path == "/api/chat", raw=body.get("raw") is True)


def chat(**more: Any) -> HttpCall:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wie groß? 日本"}]
    return _call("/api/chat", {"model": "m", "messages": messages, **more})


def generate(**more: Any) -> HttpCall:
    return _call("/api/generate", {"model": "m", "system": "Be brief.", "prompt": "Wie groß?", **more})


def raw(**more: Any) -> HttpCall:
    prompt = "<|im_start|>user\nTell me.<|im_end|>\n<|im_start|>assistant\n"
    return _call("/api/generate", {"model": "m", "prompt": prompt, "raw": True, **more})


def openai(**more: Any) -> HttpCall:
    messages = [{"role": "user", "content": "Wie groß? 日本"}]
    options = {"include_usage": True}
    return _call(
        "/v1/chat/completions", {"model": "m", "messages": messages, "stream": True, "stream_options": options, **more}
    )


FORMS = {"chat": chat, "generate": generate, "raw": raw, "openai": openai}


def _call(path: str, body: dict[str, Any]) -> HttpCall:
    return HttpCall("POST", path, json.dumps(body).encode())
