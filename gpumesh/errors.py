"""The tree of errors that gpumesh raises on purpose, and the exit codes of the command line. All of it stands in this
one file, of more than 400 lines, so that the tree is seen as a whole.

::

    GPUMeshError                     exit 1
    ├── UsageError                   exit 2   the command line was wrong
    │   └── ConfigError              exit 2   mesh.yaml was wrong; holds all its problems
    ├── NoNodeError                  exit 4   no node can serve the request
    │   ├── ModelMissing             exit 4   nodes are up, but none has the model
    │   └── ServersFailed            exit 4   two servers failed at the request: it may be the cause
    ├── DeadlineExceeded             exit 1   the caller's overall deadline passed
    ├── QueueFull                    exit 1   the gateway's queue is at its limit (503)
    ├── MeshAlreadyRunning           exit 1
    ├── MeshNotRunning               exit 1
    ├── TunnelError                  one node's tunnel; ``needs_person``: see (p)
    │   ├── HostUnresolved           DNS does not know the host
    │   ├── ConnectRefused           nothing listens on the SSH port
    │   ├── ConnectTimeout           no answer to TCP or to the SSH handshake
    │   ├── HostUnreachable          no route, network down
    │   ├── NotSsh                   something listens, but does not speak SSH
    │   ├── HostKeyUnknown      (p)  not in known_hosts, policy strict
    │   ├── HostKeyChanged      (p)  in known_hosts with another key
    │   ├── HostKeyRevoked      (p)  marked @revoked
    │   ├── KeyUnreadable       (p)  identity file missing, unreadable, not a key, or its passphrase wrong
    │   ├── SecretMissing       (p)  the variable that holds a password or passphrase is not set
    │   ├── AuthRefused         (p)  the host accepts none of our credentials
    │   ├── ForwardingForbidden (p)  AllowTcpForwarding no, or PermitOpen
    │   ├── TransportUnsupported(p)  this host needs another transport or another address form
    │   ├── TunnelLost               the tunnel was up and broke: reset, no answer to keepalive, worker died
    │   └── TunnelDown               a command or a request needs a tunnel that is not up now
    ├── PoolError                    a pool of GPUs; ``needs_person``: see (p)
    │   ├── PoolFailed               its worker or head ended, its tunnel was lost, or its head reports another plan
    │   ├── PoolMemberAway           its head cannot be reached now
    │   ├── PoolMemberUnusable  (p)  a node of mesh.yaml on whose host nothing can be started, or that is disabled
    │   ├── PoolDoesNotFit      (p)  the members' memory is too small for the model and its context
    │   ├── PoolProgramMissing  (p)  a host has no llama-server, or no ggml-rpc-server
    │   ├── PoolVersionsDiffer  (p)  the members have different builds of llama.cpp
    │   └── PoolModelMissing    (p)  the head's host does not have the model, or its file cannot be used
    ├── BatchError                   a batch or a file of the batch store
    │   ├── BatchNotFound            exit 2   the store has no batch or file with this id
    │   ├── BatchOwnerUnknown        this gateway does not have the API key with which it was made
    │   ├── BatchConflict            its status forbids this: cancelled after its end, deleted before it
    │   └── BatchStoreError          the store cannot be used now: disk full, locked, Redis away
    ├── ExecError                    a command could not be run on a host (no session, time-out)
    ├── ProbeError                   nvidia-smi or the backend gave an answer that we cannot read
    └── BackendError                 one attempt on one backend failed
        ├── BackendUnreachable       refused, reset, timed out before the answer
        ├── BackendStatus            an HTTP status that is an error; holds status and body
        └── StreamCut                the answer ended before its final frame

(p): a person must act; retrying alone cannot help. A ``code`` is stable: JSON, logs and ``gpumesh explain CODE`` use it
(docs/codes.md lists them all). An error's text is one sentence that says what is wrong and where; ``hint`` says what to
do. Neither ever contains a secret.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, TypeVar

E = TypeVar("E", bound="GPUMeshError")


class ExitCode(IntEnum):
    """The exit codes of the command line. Scripts rely on them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    DEGRADED = 3  # the mesh works, but something is not as it should be
    NO_NODE = 4  # no node can serve
    INTERRUPTED = 130  # Ctrl-C: 128 and the number of SIGINT


class GPUMeshError(Exception):
    """The root of the tree. ``node`` names the node at fault, if there is one; ``hint`` says what to do."""

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[ExitCode] = ExitCode.FAILED
    default_hint: ClassVar[str | None] = None

    def __init__(self, message: str, *, hint: str | None = None, node: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint if hint is not None else self.default_hint
        self.node = node

    def __str__(self) -> str:
        return self.message


class UsageError(GPUMeshError):
    code = "usage"
    exit_code = ExitCode.USAGE


def unknown_node(name: str, known: Iterable[str]) -> UsageError:
    """The error for a node that a person named and the mesh does not have. ``known``: the names of the mesh's nodes."""
    from difflib import get_close_matches  # here, as quick commands do not need it

    names = list(known)
    hint = f"the nodes are: {', '.join(names)}"
    similar_names = get_close_matches(name, names, n=1)
    if similar_names:
        hint = f"did you mean {similar_names[0]}? The nodes are: {', '.join(names)}"
    return UsageError(f"there is no node {name!r}", hint=hint)


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of mesh.yaml. ``line`` and ``column`` count from 1; ``path`` is like ``nodes[1].ssh.port``."""

    message: str
    file: str
    line: int | None = None
    column: int | None = None
    path: str = ""

    def __str__(self) -> str:
        """``FILE:LINE:COLUMN: PATH: MESSAGE``, without the parts that are not known."""
        location = self.file
        if self.line is not None:
            location += f":{self.line}"
            if self.column is not None:
                location += f":{self.column}"
        if self.path:
            return f"{location}: {self.path}: {self.message}"
        return f"{location}: {self.message}"


class ConfigError(UsageError):
    """mesh.yaml cannot be used. ``problems`` holds all its problems, in the order of the file."""

    code = "config"

    def __init__(self, problems: tuple[Problem, ...], *, hint: str | None = None) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems), hint=hint)


class NoNodeError(GPUMeshError):
    """No node can serve the request now. ``retry_after_s``: the time until a node is tried again; ``None`` if it is not
    known. ``was_tried``: nodes have got the request, and have failed."""

    code = "no-node"
    exit_code = ExitCode.NO_NODE
    default_hint = "`gpumesh status` shows each node and why it cannot serve"
    retry_after_s: float | None = None
    was_tried: bool = False


class ModelMissing(NoNodeError):
    """Nodes are up, but none has the model. ``available`` lists the models that they have. ``short_hint`` is for
    programs: it names few of them. It is the ``hint`` if it is not given."""

    code = "model-missing"

    def __init__(
        self,
        model: str,
        *,
        available: tuple[str, ...] = (),
        hint: str | None = None,
        short_hint: str | None = None,
    ) -> None:
        self.model = model
        self.available = available
        self.short_hint = hint if short_hint is None else short_hint
        super().__init__(f"no node that is up has the model {model!r}", hint=hint)


class ServersFailed(NoNodeError):
    """Servers have failed at this very request. The request may be the cause, so no other server must get it."""

    code = "servers-failed"
    default_hint = "it may be the request itself that makes them fail"


class DeadlineExceeded(GPUMeshError):
    code = "deadline"


class QueueFull(GPUMeshError):
    """The gateway's queue is at its limit. ``retry_after_s``: the estimated time until a slot is free."""

    code = "queue-full"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, hint=f"try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class MeshAlreadyRunning(GPUMeshError):
    code = "already-running"


class MeshNotRunning(GPUMeshError):
    code = "not-running"
    default_hint = "`gpumesh up -d` starts it"


class TunnelError(GPUMeshError):
    code = "tunnel"
    needs_person: ClassVar[bool] = False


class HostUnresolved(TunnelError):
    code = "host-unresolved"


class ConnectRefused(TunnelError):
    code = "connect-refused"


class ConnectTimeout(TunnelError):
    code = "connect-timeout"


class HostUnreachable(TunnelError):
    code = "host-unreachable"


class NotSsh(TunnelError):
    code = "not-ssh"


class HostKeyUnknown(TunnelError):
    code = "host-key-unknown"
    needs_person = True


class HostKeyChanged(TunnelError):
    code = "host-key-changed"
    needs_person = True


class HostKeyRevoked(TunnelError):
    code = "host-key-revoked"
    needs_person = True


class KeyUnreadable(TunnelError):
    code = "key-unreadable"
    needs_person = True


class SecretMissing(TunnelError):
    code = "secret-missing"
    needs_person = True


class AuthRefused(TunnelError):
    code = "auth-refused"
    needs_person = True


class ForwardingForbidden(TunnelError):
    code = "forwarding-forbidden"
    needs_person = True


class ReverseForwardRefused(TunnelError):
    code = "reverse-forward-refused"
    needs_person = True


class TransportUnsupported(TunnelError):
    code = "transport-unsupported"
    needs_person = True


class TunnelLost(TunnelError):
    code = "tunnel-lost"


class SessionEnded(TunnelLost):
    """The host ended the session of transport openssh before it ran our command in it, and with the session ssh itself
    ended."""

    code = "session-ended"


class TunnelDown(TunnelError):
    code = "tunnel-down"


class PoolError(GPUMeshError):
    """A pool cannot be planned, or does not run. ``needs_person``: it is of no use to start it again as it is.
    ``unreachable``: the members whose tunnels were down; with them, it may work."""

    code = "pool"
    needs_person: bool = False
    unreachable: frozenset[str] = frozenset()


class PoolFailed(PoolError):
    code = "pool-failed"


class PoolMemberAway(PoolError):
    code = "pool-member-away"


class PoolMemberUnusable(PoolError):
    code = "pool-member-unusable"
    needs_person = True


class PoolDoesNotFit(PoolError):
    code = "pool-does-not-fit"
    needs_person = True


class PoolProgramMissing(PoolError):
    code = "pool-program-missing"
    needs_person = True


class PoolVersionsDiffer(PoolError):
    code = "pool-versions-differ"
    needs_person = True


class PoolModelMissing(PoolError):
    code = "pool-model-missing"
    needs_person = True


def unknown_pool(name: str, known: Iterable[str]) -> UsageError:
    """The error for a pool that a person named and mesh.yaml does not have. ``known``: the names of its pools."""
    names = list(known)
    hint = f"the pools are: {', '.join(names)}" if names else "mesh.yaml has no section `pools`"
    return UsageError(f"there is no pool {name!r}", hint=hint)


class BatchError(GPUMeshError):
    code = "batch"


class BatchNotFound(BatchError):
    code = "batch-not-found"
    exit_code = ExitCode.USAGE


class BatchConflict(BatchError):
    code = "batch-conflict"


class BatchOwnerUnknown(BatchError):
    code = "batch-owner"


class BatchStoreError(BatchError):
    code = "batch-store"


class ExecError(GPUMeshError):
    code = "exec"


class OutputOverflow(ExecError):
    """The command's output came faster than it was read, so that the command was ended."""


class SessionRefused(ExecError):
    """The host gives no session to run a command in."""


class ProbeError(GPUMeshError):
    """A probe got an unreadable answer. The error becomes a finding with the code ``finding_code`` (``driver-broken``,
    ``wrong-server`` …)."""

    code = "probe"

    def __init__(self, message: str, *, finding_code: str, hint: str | None = None, node: str | None = None) -> None:
        super().__init__(message, hint=hint, node=node)
        self.finding_code = finding_code


class BackendError(GPUMeshError):
    code = "backend"


class BackendUnreachable(BackendError):
    """The backend refused, reset or timed out before its answer. ``request_sent``: the request had been sent by then,
    so the server may have begun to work on it."""

    code = "backend-unreachable"

    def __init__(
        self, message: str, *, hint: str | None = None, node: str | None = None, request_sent: bool = False
    ) -> None:
        super().__init__(message, hint=hint, node=node)
        self.request_sent = request_sent


class BackendStatus(BackendError):
    code = "backend-status"

    def __init__(self, message: str, *, status: int, body: bytes = b"", node: str | None = None) -> None:
        super().__init__(message, node=node)
        self.status = status
        self.body = body


class StreamCut(BackendError):
    code = "stream-cut"


def tunnel_error_from_code(code: str, message: str, *, hint: str | None = None, node: str | None = None) -> TunnelError:
    """Returns the tunnel error of the type that has ``code``: another process sends an error as its code and text.

    A code that this version does not know gives a plain TunnelError.
    """
    return (_find_error_type(TunnelError, code) or TunnelError)(message, hint=hint, node=node)


def pool_error_from_code(code: str, message: str, *, hint: str | None = None, node: str | None = None) -> GPUMeshError:
    """Returns the error of a pool or of a tunnel of the type that has ``code``. Another code gives a PoolFailed."""
    pool_type, tunnel_type = _find_error_type(PoolError, code), _find_error_type(TunnelError, code)
    return (pool_type or tunnel_type or PoolFailed)(message, hint=hint, node=node)


def _find_error_type(root: type[E], code: str) -> type[E] | None:
    """The type with ``code`` among ``root`` and the types below it."""
    types_to_check = [root]
    while types_to_check:
        error_type = types_to_check.pop()
        if error_type.code == code:
            return error_type
        types_to_check.extend(error_type.__subclasses__())
    return None
