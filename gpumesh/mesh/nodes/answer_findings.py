"""The finding about a node whose requests get answers that no inference server has sent. Pure."""

from __future__ import annotations

from gpumesh.state import Finding, Severity


def find_foreign_answer(node: str, foreign: str | None) -> tuple[Finding, ...]:
    """The finding, if there is one. ``foreign``: see ``Ledger.foreign_answer``."""
    if foreign is None:
        return ()
    return (
        Finding(
            "answer-foreign",
            Severity.WARNING,
            node,
            f"a request got no answer of an inference server: {foreign}",
            "a proxy, a login page or another program answers: see its log, or point `backend.port` or `backend.url` "
            "at the inference server itself; requests go to other nodes where they can",
        ),
    )
