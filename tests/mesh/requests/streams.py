"""Frames, faults and answers for the tests of streaming answers."""

from __future__ import annotations

from gpumesh.balancer.outcomes import Outcome
from gpumesh.lab.profile import Faults
from gpumesh.mesh.requests.answer import Answer
from tests.mesh.meshes import (
    RunningMesh,
    count_final_frames,
    make_call,
    send,
    text_of,
)

FRAME = b'{"message":{"content":" x"},"done":false}\n'
FINAL = b'{"message":{"content":""},"done":true,"done_reason":"stop","eval_count":5,"eval_duration":1000000}\n'
FAULTS = {
    "reset": Faults(cut_after_tokens=7),
    "silent end": Faults(end_after_tokens=7),
    "error line": Faults(error_line_after_tokens=7),
    "stall": Faults(stall_after_tokens=7),
}


PATIENCE_S = 1.0  # more than what a busy machine may hold up a token


async def uncut_text(running: RunningMesh, path: str) -> str:
    """The text of an answer without any fault."""
    return text_of(await (await send(running.mesh, make_call(path))).read())


async def send_and_cut(running: RunningMesh, path: str, faults: Faults, uncut: str) -> tuple[Answer, bytes]:
    await running.hosts["a"].set_faults(faults)
    answer = await send(running.mesh, make_call(path))
    assert answer.node == "a"
    data = await answer.read()
    await running.hosts["a"].set_faults(Faults())
    assert text_of(data) == uncut
    assert count_final_frames(data) == 1
    assert (answer.node, answer.attempts, answer.continuations) == ("b", 2, 1)
    assert answer.outcome is Outcome.SERVED
    return answer, data
