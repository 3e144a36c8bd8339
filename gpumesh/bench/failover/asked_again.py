"""Asks for answers again when nothing disturbs them, and compares: what did clients get twice, and what not at all?

Only answers that come out equal each time can be compared. So some answers that nothing disturbed are asked for again,
too: if one of them differs, nothing is concluded. (With temperature 0 and one seed, servers differ nevertheless where
they compute in batches, or take a part of a prompt from a cache.)
"""

from __future__ import annotations

from collections.abc import Sequence

from gpumesh.bench.figures.outages.failover import OutageTimes, TextCheck, was_continued
from gpumesh.bench.figures.outages.text_comparison import compare_texts
from gpumesh.bench.load.samples import LoadSample, SampleOutcome, StageRun
from gpumesh.bench.load.send_prompt import SendPrompt
from gpumesh.errors import GPUMeshError
from gpumesh.event_loop.async_iterators import closing_iterator

MAX_COMPARED = 8  # continued answers
MAX_CONTROLS = 3  # answers that nothing disturbed


async def check_texts(send: SendPrompt, run: StageRun, times: OutageTimes) -> TextCheck:
    """Asks again for continued answers and for some undisturbed ones, one at a time, and compares the texts."""
    continued = [record for record in run.records if was_continued(record, times, run.start_s)][:MAX_COMPARED]
    if not continued:
        return TextCheck()
    before_s = times.asked_s - run.start_s
    controls = [record for record in run.records if _is_undisturbed(record, before_s)][:MAX_CONTROLS]
    is_deterministic = True
    for record in controls:
        pieces = await _ask_again(send, run, record)
        is_deterministic = is_deterministic and pieces is not None and "".join(pieces) == record.text
    if not controls or not is_deterministic:
        return TextCheck(is_deterministic=is_deterministic if controls else None)
    differences = []
    for record in continued:
        pieces = await _ask_again(send, run, record)
        if pieces is not None and record.text is not None:
            differences.append(compare_texts(record.text, pieces))
    counted = [difference for difference in differences if not difference.is_other_text]
    return TextCheck(
        compared=len(differences),
        other_texts=len(differences) - len(counted),
        repeated=sum(difference.repeated or 0 for difference in counted) if counted else None,
        lost=sum(difference.lost or 0 for difference in counted) if counted else None,
        is_deterministic=True,
    )


def _is_undisturbed(record: LoadSample, before_s: float) -> bool:
    """Whether one node has answered in one attempt, before the outage."""
    is_whole = record.outcome is SampleOutcome.SERVED and record.attempts == 1 and record.node == record.first_node
    return is_whole and bool(record.text) and record.ended_s < before_s


async def _ask_again(send: SendPrompt, run: StageRun, record: LoadSample) -> Sequence[str] | None:
    """The pieces of another answer to the record's prompt; ``None`` if it fails."""
    pieces: list[str] = []
    try:
        async with send(run.stage.requests[record.index].chat, None) as answer, closing_iterator(aiter(answer)) as read:
            async for chunk in read:
                if chunk.text:
                    pieces.append(chunk.text)
    except GPUMeshError:
        return None
    return pieces
