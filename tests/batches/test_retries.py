"""Which failures of a request count, and what is its result at once."""

from __future__ import annotations

import pytest

from gpumesh.batches.retries import MAX_TRIES, TryAgain, judge_error, judge_reply
from gpumesh.batches.values import Reply
from gpumesh.errors import (
    BackendStatus,
    DeadlineExceeded,
    GPUMeshError,
    MeshNotRunning,
    ModelMissing,
    NoNodeError,
    QueueFull,
    ServersFailed,
    StreamCut,
    UsageError,
)
from gpumesh.gateway.http.errors import BadRequest, TooManyRequests
from gpumesh.mesh.requests.failures import all_failed_error

LAST = MAX_TRIES - 1


@pytest.mark.parametrize(
    ("error", "tries", "expected"),
    [
        (QueueFull("full", retry_after_s=3.0), LAST, TryAgain(3.0, counts=False)),
        (NoNodeError("all are away"), LAST, TryAgain(10.0, counts=False)),
        (MeshNotRunning("it stops"), LAST, TryAgain(1.0, counts=False)),
        (TooManyRequests("budget", retry_after_s=1e6), LAST, TryAgain(3600.0, counts=False)),
        (all_failed_error([]), 0, TryAgain(5.0, counts=True)),
        (all_failed_error([]), LAST, None),
        (StreamCut("cut"), 0, TryAgain(0.0, counts=True)),
        (StreamCut("cut"), LAST, None),
        (DeadlineExceeded("late"), 1, TryAgain(20.0, counts=True)),
        (DeadlineExceeded("late"), LAST, None),
        (BackendStatus("overload", status=502), 2, TryAgain(80.0, counts=True)),
        (BackendStatus("wrong", status=400), 0, None),
        (BackendStatus("slow", status=408), 0, TryAgain(5.0, counts=True)),
        (ServersFailed("two"), 0, TryAgain(5.0, counts=True)),
        (ServersFailed("two"), 1, None),
        (ModelMissing("m"), 0, None),
        (UsageError("no such node"), 0, None),
        (BadRequest("forbidden", status=403), 0, None),
    ],
)
def test_errors(error: GPUMeshError, tries: int, expected: TryAgain | None) -> None:
    assert judge_error(error, tries) == expected


def test_another_gateway_may_have_the_model_or_the_node() -> None:
    for error in (ModelMissing("m"), UsageError("no such node")):
        assert judge_error(error, 0, is_shared=True) == TryAgain(5.0, counts=True)
        assert judge_error(error, LAST, is_shared=True) is None


@pytest.mark.parametrize(
    ("reply", "tries", "expected"),
    [
        (Reply(200, b""), 0, None),
        (Reply(400, b""), 0, None),
        (Reply(429, b"", retry_after_s=7.0), LAST, TryAgain(7.0, counts=False)),
        (Reply(503, b"", retry_after_s=2.0), LAST, TryAgain(2.0, counts=False)),
        (Reply(503, b""), 0, TryAgain(5.0, counts=True)),
        (Reply(500, b""), LAST, None),
        (Reply(408, b""), 1, TryAgain(20.0, counts=True)),
    ],
)
def test_replies(reply: Reply, tries: int, expected: TryAgain | None) -> None:
    assert judge_reply(reply, tries) == expected
