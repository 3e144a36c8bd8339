"""The findings about models that fail on a node, and their state for people. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpumesh.balancer.breaker import ModelFault
from gpumesh.balancer.outcomes import Blame
from gpumesh.state import BrokenModelState, Finding, Severity
from gpumesh.text.printable import printable
from gpumesh.text.quoting import paste_command
from gpumesh.text.sentences import join_some

MAX_NAMED = 4  # a message names at most so many models, and counts the others


def describe_model_fault(fault: ModelFault) -> str:
    """What is wrong with the model on its node, as the end of a sentence: ``cannot load llama3.1:70b: out of memory``.
    The caller writes the node's name before it."""
    model = printable(fault.model)
    if fault.blame is Blame.MISSING_MODEL:
        return f"lists {model}, but answers that it is not there"
    verb = "cannot load" if fault.blame is Blame.MODEL_LOAD else "fails at"
    return f"{verb} {model}: {fault.message}" if fault.message else f"{verb} {model}"


def find_model_findings(node: str, faults: Sequence[ModelFault]) -> Iterator[Finding]:
    """Yields at most one finding of each code. A missing model is a finding only after the server has listed it once
    more (``confirmed``): before that, its list may have been out of date."""
    missing = [printable(fault.model) for fault in faults if fault.blame is Blame.MISSING_MODEL and fault.confirmed]
    if missing:
        yield Finding(
            "model-listed-missing",
            Severity.WARNING,
            node,
            f"lists {join_some(missing, MAX_NAMED)}, but answers that it is not there",
            "until the server's list changes, no request for it goes there: remove it on the host, or pull it again, "
            f"with Ollama: {paste_command('ollama pull {MODEL}', MODEL=missing[0])}",
        )
    failing = [fault for fault in faults if fault.blame is not Blame.MISSING_MODEL]
    if failing:
        yield Finding(
            "model-unloadable",
            Severity.WARNING,
            node,
            "; ".join(describe_model_fault(fault) for fault in failing[:MAX_NAMED]),
            "free memory on the host (`ollama ps`, `nvidia-smi`), or choose a smaller model, quantisation or "
            "`num_ctx`; requests for it go to other nodes, and it is tried again at intervals",
        )


def broken_model_states(faults: Sequence[ModelFault], now: float) -> tuple[BrokenModelState, ...]:
    """The faults as people see them. ``now`` is the time of the clock that the breakers use, in seconds."""
    return tuple(
        BrokenModelState(
            printable(fault.model),
            fault.blame.value,
            fault.message or None,
            None if fault.breaker.open_until is None else round(max(fault.breaker.open_until - now, 0.0), 3),
        )
        for fault in faults
    )
