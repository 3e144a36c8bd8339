"""A worker's ``ConnectionEvents`` that keeps what is reported, for tests."""

from __future__ import annotations

from gpumesh.topology import Target


class RecordedEvents:
    """``answers`` are what a person answers, one after the other; without any, nobody is there."""

    def __init__(self, *answers: str) -> None:
        self.forward_failures: list[tuple[Target, str]] = []
        self.questions: list[tuple[str, bool]] = []
        self.refused_peers: list[tuple[int, int]] = []
        self._answers = list(answers)

    @property
    def has_person(self) -> bool:
        return bool(self._answers)

    async def ask_person(self, text: str, *, echo: bool) -> str | None:
        self.questions.append((text, echo))
        return self._answers.pop(0) if self._answers else None

    def report_forward_failed(self, target: Target, code: str, message: str) -> None:
        assert str(target.port) in message
        self.forward_failures.append((target, code))

    def report_peer_refused(self, port: int, uid: int) -> None:
        self.refused_peers.append((port, uid))
