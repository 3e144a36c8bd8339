"""Identifies the kind of the server that answers at a URL, for ``kind: auto``.

The dialects are tried in the order of ``DIALECTS``. Dialects that ask for the same path share its answer: one request
is enough for Ollama, two for any other server. The probe that follows uses these answers and does not ask again.
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
"""Sends one request; returns the HTTP status and the body. Raises ProbeError if no answer comes."""


@dataclass(frozen=True, slots=True)
class IdentifiedServer:
    """The kind of a server, and the answers that it has already given, by the path of the request."""

    kind: BackendKind
    answers: Mapping[str, tuple[int, bytes]]


@dataclass(slots=True)
class KnownKinds:
    """The kinds of one node's servers that were identified by earlier probes, by URL. A kind is forgotten when a probe
    of that server fails. ``last`` is the kind of the server that was in use last."""

    last: BackendKind | None = None
    _by_url: dict[str, BackendKind] = field(default_factory=dict)

    def find(self, url: str) -> BackendKind | None:
        """The kind of the server at this URL; ``None`` if the server must be asked which kind it is."""
        return self._by_url.get(url)

    def remember(self, url: str, kind: BackendKind) -> None:
        """Stores the kind of the server at this URL, unless the kind is generic.

        A generic kind means only that the server has OpenAI's API. If another server takes the port, it probably has
        this API too, and nothing would show the change. So a generic server is asked for its kind at each probe."""
        if not DIALECTS[kind].is_generic:
            self._by_url[url] = kind

    def forget(self, url: str) -> None:
        self._by_url.pop(url, None)


async def identify_server(ask: AskServer) -> IdentifiedServer:
    """Asks a server until a dialect recognizes an answer, and returns that dialect's kind. Raises the ProbeError of
    ``ask``. If no dialect recognizes an answer, raises a ProbeError that says what the answers mean."""
    answers: dict[str, tuple[int, bytes]] = {}
    for kind, dialect in DIALECTS.items():
        call = dialect.probe_calls()[dialect.identity_probe]
        if call.path not in answers:
            answers[call.path] = await ask(call)
        status, body = answers[call.path]
        if dialect.recognizes(status, body):
            return IdentifiedServer(kind, answers)
    raise _unknown_server_error(answers)


_USUAL_PORTS_HINT = "point `backend.port` or `backend.url` at the server itself; usual ports are " + ", ".join(
    f"{dialect.usual_port} for {dialect.label}" for dialect in DIALECTS.values() if dialect.usual_port is not None
)


def _unknown_server_error(answers: dict[str, tuple[int, bytes]]) -> ProbeError:
    """The error for a server of which no dialect recognizes an answer. A refusal or a broken answer tells more than an
    answer of an unknown form. The last path is read first: most kinds of server have it (``/v1/models``)."""
    for path, (status, body) in reversed(answers.items()):
        try:
            unusable_answers.raise_for_status(status, body)
        except ProbeError as error:  # a refusal, or a server that is overloaded or still loading
            return error
        broken_error = unusable_answers.broken_json_error(body, path) if status == 200 else None
        if broken_error is not None:
            return broken_error
    last_path, (status, body) = next(reversed(answers.items()))
    return unusable_answers.other_server_error("an inference server", last_path, status, body, hint=_USUAL_PORTS_HINT)
