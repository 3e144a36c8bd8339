"""Which kind of server answers at a URL, found out by asking it: ``kind: auto``.

The dialects are tried in the order of ``DIALECTS``; those that ask for the same path share its answer, so that two
requests are enough for each server that is none of Ollama's, and one for Ollama's. What was asked is not asked again by
the probe that follows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from gpumesh.backends import unusable_answers
from gpumesh.backends.base import HttpCall
from gpumesh.backends.dialects import DIALECTS
from gpumesh.errors import ProbeError
from gpumesh.topology import BackendKind

AskServer = Callable[[HttpCall], Awaitable[tuple[int, bytes]]]
"""One request; raises ProbeError where no answer comes."""


@dataclass(frozen=True, slots=True)
class IdentifiedServer:
    """``answers`` are those that it has given already, by the path that was asked for."""

    kind: BackendKind
    answers: Mapping[str, tuple[int, bytes]]


@dataclass(slots=True)
class KnownKinds:
    """The kinds of the servers that have identified themselves, by URL, as long as each probe finds it so. ``last`` is
    the kind of the server that was in use last."""

    last: BackendKind | None = None
    _by_url: dict[str, BackendKind] = field(default_factory=dict)

    def find(self, url: str) -> BackendKind | None:
        return self._by_url.get(url)

    def remember(self, url: str, kind: BackendKind) -> None:
        """What all servers with OpenAI's API have in common identifies none of them: after another server has taken the
        port it could be so still. So such a server is asked anew at each probe."""
        if not DIALECTS[kind].is_generic:
            self._by_url[url] = kind

    def forget(self, url: str) -> None:
        self._by_url.pop(url, None)


async def identify_server(ask: AskServer) -> IdentifiedServer:
    """Raises ProbeError: what ``ask`` raises, and what its answers mean where no dialect recognizes one."""
    answers: dict[str, tuple[int, bytes]] = {}
    for kind, dialect in DIALECTS.items():
        call = dialect.probe_calls()[dialect.identity_probe]
        if call.path not in answers:
            answers[call.path] = await ask(call)
        if dialect.recognizes(*answers[call.path]):
            return IdentifiedServer(kind, answers)
    raise _unknown_server_error(answers)


_USUAL_PORTS_HINT = "point `backend.port` or `backend.url` at the server itself; usual ports are " + ", ".join(
    f"{dialect.usual_port} for {dialect.label}" for dialect in DIALECTS.values() if dialect.usual_port is not None
)


def _unknown_server_error(answers: dict[str, tuple[int, bytes]]) -> ProbeError:
    for path, (status, body) in reversed(answers.items()):
        try:
            unusable_answers.raise_for_status(status, body)
        except ProbeError as error:
            return error
        if status == 200 and (broken := unusable_answers.broken_json_error(body, path)) is not None:
            return broken
    path, (status, body) = next(reversed(answers.items()))
    return unusable_answers.other_server_error("an inference server", path, status, body, hint=_USUAL_PORTS_HINT)
