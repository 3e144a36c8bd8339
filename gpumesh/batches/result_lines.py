"""Makes the line of the output file or error file for what became of a request. Pure.

For an endpoint of OpenAI's API the line is as that API has it, for a prompt as a result of `gpumesh run -f`.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import msgspec

from gpumesh.batches.prompt_lines import read_prompt_line
from gpumesh.batches.request_lines import LineProblem, read_request_line
from gpumesh.batches.values import PROMPT_ENDPOINT, Claim, Reply, Result
from gpumesh.errors import UsageError

EXPIRED_CODE = "batch_expired"
EXPIRED_MESSAGE = "This request could not be executed before the completion window expired."  # OpenAI's own text
# The members of a result of `gpumesh run -f` after ``index`` and ``prompt``, when there is no answer.
_NO_ANSWER = {
    "response": None,
    "node": None,
    "attempts": 0,
    "ttft_ms": None,
    "total_ms": None,
    "tokens": None,
    "tokens_per_s": None,
}
_encode = msgspec.json.Encoder().encode


def request_id(claim: Claim) -> str:
    """The name of a request in logs and in its result: the same for each try."""
    digest = blake2b(f"{claim.batch_id}/{claim.line}".encode(), digest_size=12).hexdigest()
    return f"batch_req_{digest}"


def make_result(claim: Claim, reply: Reply) -> Result:
    """The result of a request that a server has answered. A status of 400 or above is a failure."""
    failed = reply.status >= 400
    body = _compact(reply.body)
    if claim.endpoint != PROMPT_ENDPOINT:
        response = {"status_code": reply.status, "request_id": request_id(claim), "body": body}
        return Result(claim, _openai_line(claim, response, None), failed)
    line: dict[str, Any] = {"index": claim.line - 1, "prompt": _prompt_text(claim), **_NO_ANSWER, "error": None}
    if failed:
        line |= {"node": reply.node, "attempts": reply.attempts, "error": f"status {reply.status}"}
    else:
        line |= msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return Result(claim, _encode(line), failed)


def make_error_result(
    claim: Claim, code: str, message: str, *, node: str | None = None, attempts: int = 0, expired: bool = False
) -> Result:
    """The result of a request that has no answer. ``code`` is a short word for programs, ``message`` a sentence."""
    if claim.endpoint != PROMPT_ENDPOINT:
        return Result(claim, _openai_line(claim, None, {"code": code, "message": message}), True, expired)
    line = {"index": claim.line - 1, "prompt": _prompt_text(claim), **_NO_ANSWER, "error": message}
    line |= {"node": node, "attempts": attempts}
    return Result(claim, _encode(line), True, expired)


def make_expired_result(claim: Claim) -> Result:
    """The result of a request that was not answered within the batch's window."""
    return make_error_result(claim, EXPIRED_CODE, EXPIRED_MESSAGE, expired=True)


def _openai_line(claim: Claim, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    try:
        custom_id = read_request_line(claim.endpoint, claim.content).custom_id
    except LineProblem:  # the input file is not what it was
        custom_id = ""
    return _encode({"id": request_id(claim), "custom_id": custom_id, "response": response, "error": error})


def _prompt_text(claim: Claim) -> str:
    try:
        return read_prompt_line(claim.content.decode("utf-8", "replace"), "line").text
    except UsageError:  # the input file is not what it was
        return ""


def _compact(body: bytes) -> msgspec.Raw:
    """The JSON of an answer without line breaks; any other body as a JSON string."""
    try:
        compact = msgspec.json.format(body, indent=-1)
        compact.decode()
    except (ValueError, RecursionError):
        return msgspec.Raw(_encode(body.decode("utf-8", "replace")))
    return msgspec.Raw(compact)
