"""What an inference server at one URL says of itself: version, models, what is loaded. Read by the server's dialect."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import httpx

from gpumesh.backends.base import HttpCall, Inventory
from gpumesh.backends.dialects import DIALECTS, host_header
from gpumesh.errors import ProbeError
from gpumesh.probes.bounded_get import SILENT_SERVER_HINT, get_bounded
from gpumesh.topology import BackendKind, Target

OPTIONAL_TIMEOUT_S = 1.5  # for the answers that a kind of server can do without; later they count as unknown
_WRONG_KEY_HINT = "it does not accept the key that it was given: check the variable that `backend.api_key_env` names"


@dataclass(frozen=True, slots=True)
class TimedInventory:
    """``latency_ms``: the time to the first of the answers."""

    inventory: Inventory
    latency_ms: float


async def ask_server(
    client: httpx.AsyncClient,
    kind: BackendKind,
    url: str,
    target: Target | None,
    *,
    api_key: str | None,
    timeout_s: float,
) -> TimedInventory:
    """What a server of this kind says of itself at ``url``; ``target`` is the same server as its own host knows it.

    Raises ProbeError, and nothing else on the server's account.
    """
    dialect = DIALECTS[kind]
    calls = dialect.probe_calls()
    headers, extensions = build_request_options(target, api_key)
    started = time.perf_counter()
    latencies_ms: list[float] = []

    async def get_answer(name: str, call: HttpCall) -> tuple[int, bytes] | ProbeError | None:
        """``None`` for an optional answer that did not come."""
        required = name in dialect.required_probes
        limit_s = timeout_s if required else min(timeout_s, OPTIONAL_TIMEOUT_S)
        try:
            async with asyncio.timeout(limit_s):
                answer = await get_bounded(client, url + call.path, headers, extensions)
        except ProbeError as error:
            return error if required else None
        except TimeoutError:
            message = f"it did not answer within {limit_s:g} s"
            return ProbeError(message, finding_code="backend-down", hint=SILENT_SERVER_HINT) if required else None
        latencies_ms.append((time.perf_counter() - started) * 1000.0)
        return answer

    results = await asyncio.gather(*(get_answer(name, call) for name, call in calls.items()))
    try:
        answers: dict[str, tuple[int, bytes] | None] = {}
        for name, result in zip(calls, results, strict=True):
            if isinstance(result, ProbeError):
                raise result
            answers[name] = result
        return TimedInventory(dialect.read_inventory(answers), min(latencies_ms))
    except ProbeError as error:
        place = url if target is None else target.url
        hint = _WRONG_KEY_HINT if error.finding_code == "key-refused" and api_key is not None else error.hint
        raise ProbeError(f"{place}: {error.message}", finding_code=error.finding_code, hint=hint) from error


def build_request_options(target: Target | None, api_key: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The headers and httpx's extensions of a request to a server that is ``target`` on its own host."""
    headers = {"Accept-Encoding": "identity"}
    if target is not None:
        headers["Host"] = host_header(target)
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    # Through a tunnel the certificate is for the host's own name, not for our end of the tunnel.
    return headers, {"sni_hostname": target.host} if target is not None and target.scheme == "https" else {}
