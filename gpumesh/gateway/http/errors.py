"""The errors that a client causes: its request is wrong, or it does not take its answer."""

from __future__ import annotations

from gpumesh.errors import GPUMeshError


class BadRequest(GPUMeshError):
    """The client's own mistake. ``status``: the HTTP status of the answer to it."""

    code = "bad-request"

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class TooManyRequests(BadRequest):
    """The holder of an API key has used as much as it may (429). ``retry_after_s``: the seconds until it may use more.
    ``may_retry``: that is so soon that a program should try again by itself."""

    def __init__(self, message: str, *, retry_after_s: float, may_retry: bool = True) -> None:
        super().__init__(message, status=429)
        self.retry_after_s = retry_after_s
        self.may_retry = may_retry


class ClientStalled(GPUMeshError):
    """The client has taken nothing of its answer for some seconds, while other requests wait for a slot on its node."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the client took nothing of this answer for {seconds:g} s, and others wait for its node")


def body_too_large() -> BadRequest:
    """The error for a body that is longer than the limits allow."""
    return BadRequest("the request body is too large", status=413)
