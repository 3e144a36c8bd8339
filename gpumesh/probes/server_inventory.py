"""What an inference server at one URL says of itself: version, models, what is loaded. Read by the server's dialect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import httpx

from gpumesh.backends.base import HttpCall, Inventory
from gpumesh.backends.dialects import DIALECTS, host_header
from gpumesh.errors import ProbeError
from gpumesh.probes.bounded_get import SILENT_SERVER_HINT, get_bounded
from gpumesh.probes.server_kind import KnownKinds, identify_server
from gpumesh.topology import BackendKind, Target

OPTIONAL_TIMEOUT_S = 1.5  # for the answers that a kind of server can do without; later they count as unknown
_WRONG_KEY_HINT = "it does not accept the key that it was given: check the variable that `backend.api_key_env` names"


@dataclass(frozen=True, slots=True)
class TimedInventory:
    """What a server of this kind says of itself; ``latency_ms`` is the time to the first of its answers."""

    kind: BackendKind
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
    known_kinds: KnownKinds | None = None,
) -> TimedInventory:
    """What a server of this kind says of itself at ``url``; ``target`` is the same server as its own host knows it.

    With kind ``auto`` it is asked which kind it is, unless ``known_kinds`` holds that. Raises ProbeError, and nothing
    else on the server's account.
    """
    session = _ProbeSession(client, url, target, api_key=api_key, timeout_s=timeout_s)
    try:
        if kind in DIALECTS:
            return await session.ask_inventory(kind)
        return await _ask_unknown_server(session, url, KnownKinds() if known_kinds is None else known_kinds)
    except ProbeError as error:
        address = url if target is None else target.url
        hint = _WRONG_KEY_HINT if error.finding_code == "key-refused" and api_key is not None else error.hint
        raise ProbeError(f"{address}: {error.message}", finding_code=error.finding_code, hint=hint) from error


async def _ask_unknown_server(session: _ProbeSession, url: str, known_kinds: KnownKinds) -> TimedInventory:
    """Asks it as a server of the kind that it was at the last probe; if it is so no more, asks which it is."""
    known = known_kinds.find(url)
    if known is not None:
        try:
            return await session.ask_inventory(known)
        except ProbeError as error:
            known_kinds.forget(url)
            if error.finding_code != "wrong-server":
                raise
    identified = await identify_server(session.ask)
    answer = await session.ask_inventory(identified.kind, identified.answers)
    known_kinds.remember(url, identified.kind)
    return answer


class _ProbeSession:
    """The requests of one probe to one server, and the time to the first answer."""

    def __init__(
        self, client: httpx.AsyncClient, url: str, target: Target | None, *, api_key: str | None, timeout_s: float
    ) -> None:
        self._client = client
        self._url = url
        self._timeout_s = timeout_s
        self._headers, self._extensions = build_request_options(target, api_key)
        self._started = time.perf_counter()
        self._latency_ms: float | None = None

    async def ask(self, call: HttpCall) -> tuple[int, bytes]:
        """Raises ProbeError when no answer comes in time."""
        try:
            return await self._get(call, self._timeout_s)
        except TimeoutError:
            message = f"it did not answer within {self._timeout_s:g} s"
            raise ProbeError(message, finding_code="backend-down", hint=SILENT_SERVER_HINT) from None

    async def ask_inventory(
        self, kind: BackendKind, answers: Mapping[str, tuple[int, bytes]] = MappingProxyType({})
    ) -> TimedInventory:
        """``answers``, by path, are not asked for again. Raises ProbeError."""
        dialect = DIALECTS[kind]
        calls = dialect.probe_calls()

        async def get_answer(name: str, call: HttpCall) -> tuple[int, bytes] | ProbeError | None:
            """``None`` for an optional answer that did not come."""
            if call.path in answers:
                return answers[call.path]
            try:
                return await (self.ask(call) if name in dialect.required_probes else self._ask_optional(call))
            except ProbeError as error:
                return error

        results = await asyncio.gather(*(get_answer(name, call) for name, call in calls.items()))
        answered: dict[str, tuple[int, bytes] | None] = {}
        for name, result in zip(calls, results, strict=True):
            if isinstance(result, ProbeError):
                raise result
            answered[name] = result
        inventory = dialect.read_inventory(answered)
        assert self._latency_ms is not None, "an inventory is made of answers"
        return TimedInventory(kind, inventory, self._latency_ms)

    async def _ask_optional(self, call: HttpCall) -> tuple[int, bytes] | None:
        try:
            return await self._get(call, min(self._timeout_s, OPTIONAL_TIMEOUT_S))
        except (ProbeError, TimeoutError):
            return None

    async def _get(self, call: HttpCall, limit_s: float) -> tuple[int, bytes]:
        """Raises ProbeError and TimeoutError."""
        async with asyncio.timeout(limit_s):
            answer = await get_bounded(self._client, self._url + call.path, self._headers, self._extensions)
        if self._latency_ms is None:
            self._latency_ms = (time.perf_counter() - self._started) * 1000.0
        return answer


def build_request_options(target: Target | None, api_key: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The headers and httpx's extensions of a request to a server that is ``target`` on its own host."""
    headers = {"Accept-Encoding": "identity"}
    if target is not None:
        headers["Host"] = host_header(target)
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    # Through a tunnel the certificate is for the host's own name, not for our end of the tunnel.
    return headers, {"sni_hostname": target.host} if target is not None and target.scheme == "https" else {}
