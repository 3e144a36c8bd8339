"""Fleets for the tests of the balancer: nodes whose speed, slots and models are given."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.topology import BackendKind, PolicyKind

A, B, C = "a:latest", "b:latest", "c:latest"
KEY_A, KEY_B, KEY_C = ResidencyKey(A), ResidencyKey(B), ResidencyKey(C)
NOW = 10_000.0  # long after the clock's zero, as a monotonic clock is

TOKEN_S, READ_S, LOAD_S = 0.01, 0.001, 4.0  # of every model on a node of ``make_node``: 100 tokens/s
SHARE = 0.25  # a second stream makes each take 1.25 times as long


def make_scheduler(
    policy: PolicyKind = PolicyKind.ADAPTIVE, *, max_queue: int = 1000, pinned: Iterable[str] = ()
) -> Scheduler:
    return Scheduler(policy, rng=random.Random(1), max_queue=max_queue, pinned=frozenset(pinned))


def make_node(
    scheduler: Scheduler,
    name: str,
    *,
    slots: int | None = 1,
    loaded: Mapping[str, int | None] | Iterable[str] = (A,),
    models: Iterable[str] | None = (A, B, C),
    tier: int = 1,
    weight: float = 1.0,
    speed: float = 1.0,
    measured: bool = True,
    single: bool = True,
) -> NodeAccount:
    """Adds a node that is up. ``loaded`` are the models in its memory (with the context length, where given), which no
    request has used for long. ``speed``: so many times as fast as ``TOKEN_S`` and ``READ_S`` say. ``single``: only one
    model fits into its memory; else all do."""
    account = scheduler.roster.add(name, max_parallel=slots, tier=tier, weight=weight)
    account.kind = BackendKind.OLLAMA
    account.is_up = True
    account.models = None if models is None else frozenset(models)
    account.residency.file_mib = dict.fromkeys((A, B, C), 1000)
    account.residency.memory_mib = 2000 if single else 24_000
    contexts = loaded if isinstance(loaded, Mapping) else dict.fromkeys(loaded)
    account.residency.replace_with_report({model: (1200, contexts[model]) for model in contexts}, asked_at=NOW - 500.0)
    scheduler.note_report(account)
    if measured:
        set_speed(account, speed)
    return account


def set_speed(account: NodeAccount, speed: float = 1.0, *, load_s: float = LOAD_S) -> None:
    """Lets the node have measured its speed with all models."""
    models = (A, B, C)
    account.rates.restore(
        {
            "format": 1,
            "decode": {model: {"token_s": TOKEN_S / speed, "share": SHARE} for model in models},
            "prefill": dict.fromkeys(models, READ_S / speed),
            "load": dict.fromkeys(models, load_s),
        }
    )


def ask(model: str | None = A, *, tokens: int = 100, prompt: int = 0, **given: object) -> Demand:
    """A request whose answer has about ``tokens`` tokens, after a prompt of ``prompt`` tokens."""
    fields = {"max_tokens": tokens, "prompt_tokens": prompt, **given}
    return Demand(model, **fields)  # type: ignore[arg-type]


def ask_long(scheduler: Scheduler, tokens: int, **given: object) -> Demand:
    """A request of a client whose answers have so many tokens. Without such a history, no long answer is expected."""
    for _ in range(200):
        scheduler.experience.lengths.learn(f"client of {tokens}", "", A, tokens)
    return ask(tokens=tokens, client=f"client of {tokens}", **given)  # type: ignore[arg-type]
