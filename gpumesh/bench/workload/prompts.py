"""Makes the prompts of a benchmark. Pure.

Every prompt begins with a nonce, so that no server answers from its prefix cache. In ``replay`` all prompts begin with
the nonce of the run, so that they still share the prefixes that they share in the trace. ``think`` is sent with each
request (by default false), because Ollama's default is true for models that can think. The temperature is 0 and the
seed is fixed, so that runs can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random
from types import MappingProxyType
from typing import Any

from gpumesh.backends.base import ChatRequest, Message
from gpumesh.bench.workload.settings import BenchSettings
from gpumesh.bench.workload.traces import TracedRequest

# Ordinary words, which have about 1.3 tokens each (OpenAI's rule of thumb: a token is 0.75 words).
_VOCABULARY = tuple(
    word
    for line in (
        "river stone window garden market engine signal harbor winter copper letter bridge forest mirror planet",
        "silver ladder thunder village compass pepper lantern meadow orbit canvas anchor desert velvet rocket island",
    )
    for word in line.split()
)
TOKENS_PER_WORD = 1.3
REPLAY_BLOCK_TOKENS = 512  # tokens of a block in Mooncake's traces


@dataclass(frozen=True, slots=True)
class OwnPrompt:
    """A prompt of the user's own file. ``options`` go before those of the settings; their names are Ollama's."""

    messages: tuple[Message, ...]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class PromptFactory:
    """Makes chat requests whose prompts are in no server's prefix cache.

    The nonces come from ``rng``, so they differ in each run. The rest of the text comes from the settings' seed.
    """

    def __init__(self, settings: BenchSettings, rng: Random) -> None:
        self._settings = settings
        self._rng = rng
        self._text_rng = Random(settings.seed)
        self._run_nonce = f"{rng.getrandbits(64):016x}"

    def make_prompt(self, *, tokens: int | None = None, prompt_tokens: int | None = None) -> ChatRequest:
        """Makes a request whose prompt starts with its own nonce.

        ``tokens`` and ``prompt_tokens`` are the lengths of the answer and the prompt; ``None``: those of the settings,
        drawn for each request if the settings have a distribution.
        """
        nonce = f"{self._rng.getrandbits(64):016x}"
        settings = self._settings
        length = prompt_tokens
        if length is None:
            length = settings.prompt_lengths.draw(self._text_rng) if settings.prompt_lengths else settings.prompt_tokens
        if tokens is None and settings.answer_lengths is not None:
            tokens = settings.answer_lengths.draw(self._text_rng)
        text = _choose_words(self._text_rng, length)
        return self._make_request(f"[{nonce}] Tell a long story with these words in it: {text}.", tokens)

    def make_traced_prompt(self, traced: TracedRequest) -> ChatRequest:
        """Makes a request with a prompt and an answer of the traced request's lengths.

        Blocks with equal ids have equal text, behind the nonce of this *run*. So prompts share the prefixes that they
        share in the trace, and caches of an earlier run do not help. Without blocks, the prompt has its own nonce.
        """
        prompt_tokens = min(traced.prompt_tokens, self._settings.max_context)
        if not traced.blocks:
            return self.make_prompt(tokens=traced.output_tokens, prompt_tokens=prompt_tokens)
        block_count = math.ceil(prompt_tokens / REPLAY_BLOCK_TOKENS)  # fewer than the trace has, if the prompt is cut
        parts = [f"[{self._run_nonce}]"]
        tokens_left = prompt_tokens
        for block in traced.blocks[:block_count]:
            block_rng = Random(f"{self._settings.seed}/{block}")  # the same words for each block with this id
            parts.append(_choose_words(block_rng, min(tokens_left, REPLAY_BLOCK_TOKENS)))
            tokens_left -= REPLAY_BLOCK_TOKENS
        return self._make_request(" ".join(parts), traced.output_tokens)

    def make_system_message(self) -> tuple[Message, ...]:
        """The system prompt that all conversations of the run share, behind the nonce of the run; empty without one."""
        tokens = self._settings.system_tokens
        if not tokens:
            return ()
        text = _choose_words(Random(f"{self._settings.seed}/system"), tokens)
        return (Message("system", f"[{self._run_nonce}] {text}"),)

    def make_own_prompt(self, own: OwnPrompt) -> ChatRequest:
        """Makes a request with the user's own prompt, unchanged: there is no nonce, so a server's cache may help."""
        request = self._make_request("", None)
        return replace(request, messages=own.messages, options={**request.options, **own.options})

    def _make_request(self, prompt: str, tokens: int | None) -> ChatRequest:
        """Makes the request for an answer of ``tokens`` tokens; ``None``: the settings' number."""
        settings = self._settings
        options = {
            "num_predict": settings.tokens if tokens is None else tokens,
            "temperature": 0,
            "seed": settings.seed,
        }
        return ChatRequest(settings.model, (Message("user", prompt),), options, stream=True, think=settings.think)


def _choose_words(rng: Random, tokens: int) -> str:
    """Chooses words that have about so many tokens, at least one word."""
    count = max(round(tokens / TOKENS_PER_WORD), 1)
    return " ".join(rng.choices(_VOCABULARY, k=count))
