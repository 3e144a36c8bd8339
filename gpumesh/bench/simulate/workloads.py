"""Makes the requests that a simulation sends: from a trace, or drawn at random. Pure; the same seed, the same requests.

Each iteration over a workload draws its requests again, so that millions of requests need no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Generic, TypeVar

from gpumesh.balancer.base import Priority
from gpumesh.bench.simulate.requests import SimulatedRequest
from gpumesh.bench.workload.traces import TracedRequest

TRACE_BLOCK_TOKENS = 512  # Mooncake's blocks
BLOCK_TOKENS = 128  # the blocks of the prompts that are made here
LENGTH_SIGMA = 0.8  # of the lognormal lengths: p99 is about five times the mean, as in Azure's trace
MAX_LENGTH = 200_000  # tokens

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mix(Generic[T]):
    """Values with their shares of all requests, which need not add up to 1."""

    values: tuple[T, ...]
    shares: tuple[float, ...]

    def draw(self, rng: Random) -> T:
        if len(self.values) == 1:
            return self.values[0]
        return rng.choices(self.values, self.shares)[0]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is sent. Iterate over it for its requests, in the order of their times.

    - ``count``: how many requests; ``trace``: where they come from. Without a trace they come at random with ``rate`` a
      second (a Poisson process), with lengths around the means ``prompt_tokens`` and ``output_tokens``.
    - ``time_factor`` multiplies all times between requests.
    - ``models``, ``contexts`` and ``priorities`` are drawn for each request, or for each conversation.
    - ``clients``: how many clients there are; each request is of one of them, drawn with Zipf's law.
    - ``turns``: above 1, each arrival is a conversation. A turn sends all that was said before and a new question,
      ``think_s`` seconds after the last answer. ``system_prompts`` of ``system_tokens`` tokens begin them.
    - ``batch``: the number of additional requests at the start, all of the class BATCH and of one client.
    - ``names_sessions``: the clients name their conversations (``X-GPUMesh-Session``).
    """

    models: Mix[str]
    count: int
    rate: float = 1.0
    trace: Sequence[TracedRequest] = ()
    time_factor: float = 1.0
    prompt_tokens: float = 400.0
    output_tokens: float = 200.0
    has_fixed_lengths: bool = False
    contexts: Mix[int | None] = Mix((None,), (1.0,))
    priorities: Mix[Priority] = Mix((Priority.NORMAL,), (1.0,))
    clients: int = 1
    turns: int = 1
    think_s: float = 5.0
    system_prompts: int = 0
    system_tokens: int = 1000
    names_sessions: bool = False
    batch: int = 0
    seed: int = 1

    def __iter__(self) -> Iterator[SimulatedRequest]:
        rng = Random(self.seed)
        draws = _Draws(self, rng)
        yield from (draws.batch_request(number) for number in range(self.batch))
        if self.trace:
            yield from draws.replay_trace()
        else:
            yield from draws.arrive_at_random()

    def scaled(self, factor: float) -> Workload:
        """The same workload with all times between requests ``factor`` times as long."""
        return replace(self, time_factor=self.time_factor * factor)


class _Draws:
    """Draws the requests of one iteration over a workload."""

    def __init__(self, workload: Workload, rng: Random) -> None:
        self._workload = workload
        self._rng = rng
        self._number = workload.batch  # of the next request
        self._client_shares = [1.0 / rank for rank in range(1, workload.clients + 1)]
        self._client_names = [f"client{rank}" for rank in range(1, workload.clients + 1)]

    def batch_request(self, number: int) -> SimulatedRequest:
        """Draws a request of the batch, which is sent at the start."""
        return SimulatedRequest(
            number=number,
            at_s=0.0,
            model=self._workload.models.draw(self._rng),
            prompt_tokens=self._length(self._workload.prompt_tokens),
            output_tokens=self._length(self._workload.output_tokens),
            client="batch",
            priority=Priority.BATCH,
        )

    def replay_trace(self) -> Iterator[SimulatedRequest]:
        """Yields a request for each request of the trace, with its times and lengths."""
        workload = self._workload
        for traced in workload.trace[: workload.count]:
            yield self._request(
                traced.at_s * workload.time_factor,
                prompt_tokens=traced.prompt_tokens,
                output_tokens=traced.output_tokens,
                blocks=traced.blocks,
                block_tokens=TRACE_BLOCK_TOKENS,
            )

    def arrive_at_random(self) -> Iterator[SimulatedRequest]:
        """Yields requests, or the first turns of conversations, that arrive as a Poisson process."""
        workload = self._workload
        at_s = 0.0
        sent = 0
        while sent < workload.count:
            turns = min(workload.turns, workload.count - sent)
            at_s += self._rng.expovariate(workload.rate / workload.turns) * workload.time_factor
            if workload.turns > 1 or workload.system_prompts:
                yield self._conversation(at_s, turns)
            else:
                yield self._request(
                    at_s,
                    prompt_tokens=self._length(workload.prompt_tokens),
                    output_tokens=self._length(workload.output_tokens),
                )
            sent += turns

    def _conversation(self, at_s: float, turns: int) -> SimulatedRequest:
        """Draws a conversation, and returns its first turn. Each turn has the next turn as ``next_turn``."""
        workload, rng = self._workload, self._rng
        conversation = self._number + 1
        system = rng.randrange(workload.system_prompts) if workload.system_prompts else None
        tokens = 0 if system is None else workload.system_tokens
        system_blocks = tokens // BLOCK_TOKENS
        lengths: list[tuple[int, int]] = []  # of each turn: the tokens of its prompt, and of its answer
        for _ in range(turns):
            prompt = tokens + self._length(workload.prompt_tokens)
            answer = self._length(workload.output_tokens)
            tokens = prompt + answer
            lengths.append((prompt, answer))
        # One id for each block of the whole conversation. All conversations with the same system prompt share the ids
        # of its blocks. The numbers of conversations start at 1, so (0, …) is free for the system prompts.
        ids = tuple(
            hash((0, system, index)) if index < system_blocks else hash((conversation, index))
            for index in range(tokens // BLOCK_TOKENS)
        )
        model, context = workload.models.draw(rng), workload.contexts.draw(rng)
        client, priority = self._client(), workload.priorities.draw(rng)
        following: SimulatedRequest | None = None
        for turn, (prompt, answer) in reversed(list(enumerate(lengths))):
            following = SimulatedRequest(
                number=self._number + turn,
                at_s=at_s,
                model=model,
                prompt_tokens=prompt,
                output_tokens=answer,
                blocks=ids[: prompt // BLOCK_TOKENS],
                end_blocks=ids[: (prompt + answer) // BLOCK_TOKENS],
                block_tokens=BLOCK_TOKENS,
                context=context,
                client=client,
                priority=priority,
                session=f"s{conversation}" if workload.names_sessions else None,
                next_turn=following,
                think_s=workload.think_s,
            )
        self._number += turns
        assert following is not None
        return following

    def _request(
        self,
        at_s: float,
        *,
        prompt_tokens: int,
        output_tokens: int,
        blocks: tuple[int, ...] = (),
        block_tokens: int = BLOCK_TOKENS,
    ) -> SimulatedRequest:
        """Makes the next request. Its model, context, client and priority are drawn."""
        number = self._number
        self._number += 1
        return SimulatedRequest(
            number=number,
            at_s=at_s,
            model=self._workload.models.draw(self._rng),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            blocks=blocks,
            end_blocks=blocks,
            block_tokens=block_tokens,
            context=self._workload.contexts.draw(self._rng),
            client=self._client(),
            priority=self._workload.priorities.draw(self._rng),
        )

    def _client(self) -> str:
        """Draws the client of a request."""
        if len(self._client_names) == 1:
            return self._client_names[0]
        return self._rng.choices(self._client_names, self._client_shares)[0]

    def _length(self, mean: float) -> int:
        """Draws a number of tokens with this mean: at least 1."""
        if self._workload.has_fixed_lengths:
            return max(round(mean), 1)
        mu = math.log(mean) - LENGTH_SIGMA**2 / 2.0  # so that the mean of the lognormal distribution is ``mean``
        return min(max(round(self._rng.lognormvariate(mu, LENGTH_SIGMA)), 1), MAX_LENGTH)
