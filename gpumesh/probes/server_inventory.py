"""Asks an inference server at one URL for its version, its models and the models in memory, in its own dialect."""

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

OPTIONAL_TIMEOUT_S = 1.5  # for answers that the inventory can do without; an answer that is later counts as unknown
_WRONG_KEY_HINT = "it does not accept the key that it was given: check the variable that `backend.api_key_env` names"


@dataclass(frozen=True, slots=True)
class TimedInventory:
    """A server's own description of itself; ``latency_ms`` is the time from the probe's start to the server's first
    answer."""

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
    """Asks the server at ``url`` for its inventory. ``target`` is the same server's address on its own host.

    With kind ``auto`` the server is first asked which kind it is, unless ``known_kinds`` has its kind. If the
    server does anything wrong, this raises ProbeError and no other error.
    """
    session = _ProbeSession(client, url, target, api_key=api_key, timeout_s=timeout_s)
    try:
        if kind in DIALECTS:  # any kind but ``auto``
            return await session.ask_inventory(kind)
        return await _ask_unknown_server(session, url, KnownKinds() if known_kinds is None else known_kinds)
    except ProbeError as error:
        address = url if target is None else target.url
        hint = error.hint
        if error.finding_code == "key-refused" and api_key is not None:
            hint = _WRONG_KEY_HINT  # the error's own hint tells how to set a key
        raise ProbeError(f"{address}: {error.message}", finding_code=error.finding_code, hint=hint) from error


async def _ask_unknown_server(session: _ProbeSession, url: str, known_kinds: KnownKinds) -> TimedInventory:
    """Asks a server whose kind mesh.yaml does not give.

    If an earlier probe found the kind, the server is asked as a server of this kind. The server is asked for its kind
    if no earlier probe found it, or if another kind of server answers now. Raises ProbeError for any other failure; the
    next probe then asks for the kind again, because another server may have taken the port by then."""
    last_kind = known_kinds.find(url)
    if last_kind is not None:
        try:
            return await session.ask_inventory(last_kind)
        except ProbeError as error:
            known_kinds.forget(url)
            is_other_kind = error.finding_code == "wrong-server"
            if not is_other_kind:
                raise
    server = await identify_server(session.ask)
    answer = await session.ask_inventory(server.kind, server.answers)
    known_kinds.remember(url, server.kind)
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
        self._latency_ms: float | None = None  # of the first answer

    async def ask(self, call: HttpCall) -> tuple[int, bytes]:
        """Sends a request, and returns the HTTP status and the body. Raises ProbeError, also when no answer comes in
        time."""
        try:
            return await self._get(call, self._timeout_s)
        except TimeoutError:
            message = f"it did not answer within {self._timeout_s:g} s"
            raise ProbeError(message, finding_code="backend-down", hint=SILENT_SERVER_HINT) from None

    async def ask_inventory(
        self, kind: BackendKind, answers: Mapping[str, tuple[int, bytes]] = MappingProxyType({})
    ) -> TimedInventory:
        """Sends the probe's requests for a server of this kind, and reads the inventory from the answers. Paths in
        ``answers``, which the server has already given, are not asked for again. Raises ProbeError."""
        dialect = DIALECTS[kind]
        calls = dialect.probe_calls()

        async def get_answer(name: str, call: HttpCall) -> tuple[int, bytes] | ProbeError | None:
            """The answer to one request; ``None`` for an optional answer that did not come. An error is returned and
            not raised: ``gather`` would pass it on at once, while the other requests still run."""
            if call.path in answers:
                return answers[call.path]
            try:
                if name in dialect.required_probes:
                    return await self.ask(call)
                return await self._ask_optional(call)
            except ProbeError as error:
                return error

        results = await asyncio.gather(*(get_answer(name, call) for name, call in calls.items()))
        answers_by_name: dict[str, tuple[int, bytes] | None] = {}
        for name, result in zip(calls, results, strict=True):
            if isinstance(result, ProbeError):
                raise result
            answers_by_name[name] = result
        inventory = dialect.read_inventory(answers_by_name)
        assert self._latency_ms is not None, "an inventory without any answer"
        return TimedInventory(kind, inventory, self._latency_ms)

    async def _ask_optional(self, call: HttpCall) -> tuple[int, bytes] | None:
        """As ``ask``, but returns ``None`` if no usable answer comes within ``OPTIONAL_TIMEOUT_S``."""
        try:
            return await self._get(call, min(self._timeout_s, OPTIONAL_TIMEOUT_S))
        except (ProbeError, TimeoutError):  # the inventory does without it
            return None

    async def _get(self, call: HttpCall, timeout_s: float) -> tuple[int, bytes]:
        """Sends a request, and returns the HTTP status and the body. Raises ProbeError and TimeoutError."""
        async with asyncio.timeout(timeout_s):
            answer = await get_bounded(self._client, self._url + call.path, self._headers, self._extensions)
        if self._latency_ms is None:
            self._latency_ms = (time.perf_counter() - self._started) * 1000.0
        return answer


def build_request_options(target: Target | None, api_key: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The headers, then httpx's extensions, of a request to a server whose address on its own host is ``target``. With
    ``None``, httpx takes the Host header from the URL."""
    headers = {"Accept-Encoding": "identity"}  # a small compressed body could unpack to any size
    if target is not None:
        headers["Host"] = host_header(target)
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    extensions: dict[str, str] = {}
    if target is not None and target.scheme == "https":
        # The certificate of a server behind a tunnel is for the host's own name, not for our end of the tunnel.
        extensions["sni_hostname"] = target.host
    return headers, extensions
