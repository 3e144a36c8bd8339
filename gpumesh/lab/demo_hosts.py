"""The simulated hosts of ``gpumesh demo --nodes N``: their names, GPUs (one RTX 4090 each), models and speeds.

A demo with N nodes has the first N of these hosts. To simulate other hardware in the demo, change this file.
"""

from __future__ import annotations

from typing import Any

from gpumesh.lab.profile import EMBEDDER, LLAMA_8B, QWEN_7B, QWEN_14B, HostProfile, make_host

HOST_NAMES = ("reykjavik", "tromso", "oslo", "bergen", "turku", "umea", "lulea", "aarhus")
RATES_TOKENS_PER_S = (100.0, 80.0, 120.0, 60.0)
ADDITIONAL_MODELS = ((LLAMA_8B,), (), (LLAMA_8B, EMBEDDER), (QWEN_14B,))


def make_hosts(count: int, *, load_s: float = 1.0, **changes: Any) -> tuple[HostProfile, ...]:
    """Makes the profiles of ``count`` hosts, each with one RTX 4090 and with ``QWEN_7B`` as its first model.

    The rates and the other models differ: host number n takes entry n of the tables above, and a table that is too
    short begins again. After the last name, hosts are called ``host9``, ``host10`` and so on. ``load_s`` is the time to
    load a model, in seconds. ``changes`` are other values of each HostProfile (``slots``, ``share`` …).
    """
    hosts: list[HostProfile] = []
    for number in range(count):
        name = HOST_NAMES[number] if number < len(HOST_NAMES) else f"host{number + 1}"
        models = (QWEN_7B, *ADDITIONAL_MODELS[number % len(ADDITIONAL_MODELS)])
        rate = RATES_TOKENS_PER_S[number % len(RATES_TOKENS_PER_S)]
        hosts.append(make_host(name, models=models, tokens_per_s=rate, load_s=load_s, **changes))
    return tuple(hosts)
