"""``FailedAttempt``: an attempt that failed; and what the failed attempts of one request say together.

A request that is the cause of its failures must not be sent to one server after the other. So it is counted how many
servers have failed at the request itself. A server that was not running, or a tunnel that was lost, does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpumesh.backends.error_meanings import says_model_is_missing
from gpumesh.backends.error_text import error_text
from gpumesh.balancer.outcomes import MAX_SERVER_FAILURES, SERVER_ERROR_STATUS, Blame, ErrorReply, Outcome
from gpumesh.errors import BackendStatus, GPUMeshError, NoNodeError, ServersFailed
from gpumesh.mesh.nodes.lease import Lease, LeasedNode
from gpumesh.mesh.requests.answer import WholeAnswer

# A connection that ended sooner than the longer of these two times may never have reached a server.
MIN_SERVER_S = 0.05
MIN_SERVER_RTTS = 4.0  # in round trips to the host


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt that failed; another node may succeed. ``answer`` is the server's own error, if the server sent one.

    ``request_sent``: the server may have received the request before the failure. ``was_resent``: the request was sent
    on a kept-alive connection that ended at once, and then again on a new connection. ``lease`` is the attempt's lease,
    which has been released. ``duration_s`` is the time from the last sending of the request to the failure.
    """

    node: str
    outcome: Outcome
    error: GPUMeshError
    answer: WholeAnswer | None = None
    request_sent: bool = False
    lease: Lease | None = None
    duration_s: float = 0.0
    was_resent: bool = False

    @property
    def may_have_run(self) -> bool:
        """Whether a server may have worked on the request. A server that has answered with an error has not carried
        out the request."""
        return (self.request_sent or self.was_resent) and self.answer is None


def fail_attempt(
    lease: Lease,
    outcome: Outcome,
    error: GPUMeshError,
    answer: WholeAnswer | None = None,
    *,
    foreign: str | None = None,
) -> FailedAttempt:
    """Releases the lease with this outcome, and returns the failure. ``answer`` is the server's own error. ``foreign``:
    see ``ErrorReply``."""
    reply = None
    if isinstance(error, BackendStatus):
        # The server's own error is in the body. If there is no body, the message of our error has to do.
        message = error_text(error.status, error.body) if error.body else error.message
        reply = ErrorReply(error.status, message, foreign)
    if answer is not None:
        answer.outcome = outcome  # if the client gets this answer, the request has not been served
    lease.release(outcome, error=str(error), reply=reply)
    # The traceback's frames hold the request, which holds the error. This cycle would keep the request's body in memory
    # until the garbage collector runs.
    error.__traceback__ = None
    return FailedAttempt(lease.node.name, outcome, error, answer, request_sent=answer is not None, lease=lease)


def shortest_work_s(node: LeasedNode) -> float:
    """A connection to the node that ends within this time may have ended before a server had read the request."""
    return max(MIN_SERVER_S, MIN_SERVER_RTTS * (node.tunnel_state.rtt_ms or 0.0) / 1000.0)


def find_possible_server_failures(failures: Iterable[FailedAttempt]) -> list[FailedAttempt]:
    """The attempts at which servers seem to have failed. It is not checked whether a tunnel ended the connections:
    ``find_server_failures`` does that."""
    return [failed for failed in failures if _seems_to_fail_at_request(failed) or _seems_to_fail_before_resend(failed)]


def find_server_failures(failures: Iterable[FailedAttempt]) -> list[FailedAttempt]:
    """The attempts at which servers have failed, and not the tunnels to them."""
    return [failed for failed in failures if _is_server_failure(failed) or _is_failure_before_resend(failed)]


def must_stop(server_failures: Sequence[FailedAttempt], *, has_other_node: bool) -> bool:
    """Whether so many servers have failed at the request that it must not be sent again. ``has_other_node``: another
    node than those of the failures could serve it.

    An attempt that was resent may be two failures of one server. But a server that ends each connection fails at every
    request. So another node gets the request all the same; only the same server does not get it again."""
    if len(server_failures) >= MAX_SERVER_FAILURES:
        return True
    ended_connections = sum(2 if failed.was_resent and failed.request_sent else 1 for failed in server_failures)
    return ended_connections >= MAX_SERVER_FAILURES and not has_other_node


def lost_over_ssh(failed: FailedAttempt) -> bool:
    """Whether the connection went through a tunnel and ended without an answer: then the tunnel may have ended it."""
    return failed.answer is None and failed.lease is not None and failed.lease.node.uses_ssh


def lacks_route(failed: FailedAttempt) -> bool:
    """Whether the server has answered that it does not have the route. A 404 may also be about the model."""
    if failed.outcome is not Outcome.MODEL_NOT_FOUND:
        return failed.outcome is Outcome.NOT_SUPPORTED
    model = "" if failed.lease is None else failed.lease.model or ""
    body = failed.error.body if isinstance(failed.error, BackendStatus) else b""
    return not (model and says_model_is_missing(404, error_text(404, body), model))


def all_failed_error(failures: Sequence[FailedAttempt]) -> NoNodeError:
    """The error for a request that no node has answered. It names the last failure of each node."""
    last_messages = {failed.node: failed.error.message for failed in failures}
    reasons = "; ".join(f"{node}: {message}" for node, message in last_messages.items())
    server_failures = find_server_failures(failures)
    if must_stop(server_failures, has_other_node=False):
        failed_nodes = {failed.node for failed in server_failures}
        subject = "two servers failed" if len(failed_nodes) > 1 else "the server failed twice"
        return ServersFailed(f"{subject} at this request, so no other was asked ({reasons})")
    error = NoNodeError(f"every node that could serve this has failed it ({reasons})")
    error.was_tried = True
    return error


def copy_error(error: GPUMeshError) -> GPUMeshError:
    """Makes a copy of the error, which is then raised. To raise the original would form a cycle: the frames of its
    traceback hold the failures, and the failures hold the error. Only the garbage collector would free them."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    return copy


def _seems_to_fail_at_request(failed: FailedAttempt) -> bool:
    """Whether the server seems to have failed at this request when it got it last."""
    if failed.lease is None or failed.lease.aborted:  # aborted: the tunnel was lost, or the server was silent
        return False
    if failed.lease.blame is Blame.MODEL_LOAD:  # what does not fit into one server's memory may fit into another's
        return False
    if failed.answer is not None:
        return failed.answer.status == SERVER_ERROR_STATUS
    return failed.request_sent and failed.outcome in (Outcome.UNREACHABLE, Outcome.CUT)


def _seems_to_fail_before_resend(failed: FailedAttempt) -> bool:
    """Whether the end of the kept-alive connection was the end of its server too: the server ended this connection at
    once, and then gave no answer on a new connection either, or let none be made."""
    if not failed.was_resent or failed.lease is None or failed.lease.aborted:
        return False
    return failed.answer is None and failed.outcome in (Outcome.UNREACHABLE, Outcome.CUT)


def _is_server_failure(failed: FailedAttempt) -> bool:
    """Whether the server failed at this request, and not the tunnel to it.

    A server that was not running did not fail at the request. Through a tunnel, a connection is made even if no server
    is running, but it ends at once."""
    if not _seems_to_fail_at_request(failed) or failed.lease is None:
        return False
    if not lost_over_ssh(failed):
        return True
    node = failed.lease.node
    server_was_running = node.reachable or failed.duration_s > shortest_work_s(node)
    return server_was_running and node.is_same_connection(failed.lease)


def _is_failure_before_resend(failed: FailedAttempt) -> bool:
    """As ``_seems_to_fail_before_resend``, and the tunnel has not ended the connection."""
    if not _seems_to_fail_before_resend(failed) or failed.lease is None:
        return False
    return not lost_over_ssh(failed) or failed.lease.node.is_same_connection(failed.lease)


def refused_continuation(answer: WholeAnswer) -> FailedAttempt:
    """The failure of a node that was asked for the rest of an answer, and sent a whole answer instead of a stream: the
    node does not understand the request."""
    error = BackendStatus(f"it answered {answer.status} to the rest of an answer", status=answer.status)
    return FailedAttempt(answer.node, Outcome.CANNOT_CONTINUE, error, answer)
