"""``Lease``: a slot on a node for one attempt; ``LeasedNode``: the part of a node that a request uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.outcomes import Blame, ErrorReply, Outcome
from gpumesh.balancer.scheduling.scheduler import Placement
from gpumesh.mesh.nodes.rate_meter import RateMeter
from gpumesh.state import TunnelState
from gpumesh.topology import BackendKind, Target
from gpumesh.tunnels.base import Tunnel


class LeasedNode(Protocol):
    """The part of a node that a request uses while it holds a lease there."""

    account: NodeAccount

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> BackendKind: ...

    @property
    def meter(self) -> RateMeter: ...

    @property
    def uses_ssh(self) -> bool:
        """Whether requests reach the server over a connection that can be lost while the server still runs."""

    @property
    def base_url(self) -> str:
        """The URL to which requests go, without a slash at the end. It exists only while ``reachable``."""

    @property
    def target(self) -> Target | None:
        """The server's address on its own host, which the Host header must name."""

    @property
    def reachable(self) -> bool:
        """Whether the tunnel is up and the server answered its last probe."""

    @property
    def tunnel(self) -> Tunnel | None: ...

    @property
    def tunnel_state(self) -> TunnelState: ...

    @property
    def connection_count(self) -> int:
        """How many connections the node's tunnel has had so far."""

    @property
    def coordination_key(self) -> str:
        """A name of the node's GPUs or server, the same in every gateway that reaches them."""

    def api_key(self) -> str | None:
        """The server's API key. Raises SecretMissing."""

    def is_same_connection(self, lease: Lease) -> bool:
        """Whether the tunnel still has the connection that it had when this lease was given."""

    def is_loaded(self, model: str) -> bool | None:
        """Whether the model, given by its full name, is in the server's memory; ``None`` if that is not known."""

    def server_name(self, model: str) -> str | None:
        """The name under which the node's server must be asked for a model; ``None``: ``model`` itself will do."""

    def forgive_failure(self, lease: Lease) -> None:
        """Takes back the failure with which this lease ended, because the request was at fault."""


class LeaseKeeper(Protocol):
    """Keeps account of leases: the node's ledger."""

    def settle(
        self,
        lease: Lease,
        outcome: Outcome,
        counters: ServerCounters | None,
        error: str | None,
        reply: ErrorReply | None,
    ) -> None:
        """Counts the outcome of a lease that was used."""

    def discard(self, lease: Lease) -> None:
        """Removes a lease that was never used."""

    def learns_from(self, placement: Placement) -> bool:
        """Whether the balancer would learn from the answer of this request if it ended now."""

    def note_resent(self, lease: Lease) -> None:
        """The request of this lease is sent a second time."""

    def note_answer_started(self, lease: Lease) -> None:
        """The first token of this lease's attempt has come."""


class Lease:
    """A slot on a node for one attempt. Every lease ends exactly once, with ``release`` or ``discard``.

    ``model`` is the full name of the demanded model; ``None`` if the request names none. ``placement`` is the
    balancer's decision; ``None`` for a request that needs no slot. ``give_back_place`` gives back the place that the
    lease has among all gateways, with the correction of its cost (``SharedPlaces``); ``None``: it has no such place.
    ``connection_number`` is the number of the tunnel's
    connection at the time when the lease was given. ``was_loaded``: the model was in the server's memory at this time;
    ``None`` if that is not known. ``blame`` is set at the lease's end: the breaker for which its outcome counted.

    The request sets ``can_move``, which tells whether another node could give the answer instead; it is ``None`` before
    that, and again once the answer has begun. The attempt that uses the lease sets ``abort_callback``. Both callbacks
    are dropped at the lease's end: they refer to the request, and the request refers to the lease. Only the garbage
    collector could free such a cycle.
    """

    __slots__ = (
        "_ledger",
        "_released",
        "abort_callback",
        "aborted",
        "blame",
        "can_move",
        "connection_number",
        "give_back_place",
        "model",
        "node",
        "placement",
        "was_loaded",
    )

    def __init__(self, node: LeasedNode, ledger: LeaseKeeper, model: str | None, placement: Placement | None) -> None:
        self.node = node
        self.connection_number = node.connection_count
        self.model = model
        self.placement = placement
        self.was_loaded = None if model is None else node.is_loaded(model)
        self.blame = Blame.NOBODY
        self.give_back_place: Callable[[float], None] | None = None
        self.abort_callback: Callable[[], None] | None = None
        self.can_move: Callable[[], bool] | None = None
        self.aborted = False  # the tunnel has failed
        self._ledger = ledger
        self._released = False

    def __repr__(self) -> str:
        phase = "held"
        if self._released:
            phase = "released"
        elif self.aborted:
            phase = "aborted"
        return f"<Lease {self.node.name} {phase} model {self.model} connection {self.connection_number}>"

    @property
    def released(self) -> bool:
        return self._released

    @property
    def is_learned_from(self) -> bool:
        """Whether the balancer would learn from the figures of this answer if it ended now."""
        return self.placement is not None and self._ledger.learns_from(self.placement)

    def release(
        self,
        outcome: Outcome,
        *,
        counters: ServerCounters | None = None,
        answer_bytes: int | None = None,
        error: str | None = None,
        reply: ErrorReply | None = None,
    ) -> None:
        """Gives the slot back and counts the outcome. ``counters`` are the server's figures for the answer,
        ``answer_bytes`` the bytes of its text if they were counted (``is_learned_from``), ``error`` is the reason of a
        failure in words, and ``reply`` the error that the server reported; each is ``None`` if there is none. A second
        call does nothing."""
        if not self._released:
            if answer_bytes is not None and self.placement is not None:
                self.placement.placed.answer_bytes = answer_bytes
            self._mark_released()
            self._ledger.settle(self, outcome, counters, error, reply)

    def discard(self) -> None:
        """Gives the slot back without counting an outcome, because no attempt was made with it."""
        if not self._released:
            self._mark_released()
            self._ledger.discard(self)

    def _mark_released(self) -> None:
        """Marks the lease's end, and drops both callbacks."""
        self._released = True
        self.abort_callback = self.can_move = None

    def mark_answer_started(self) -> None:
        """The attempt calls this when its answer has begun. From then on no other node can give this answer, and
        half-open breakers may allow the next trial."""
        self.can_move = None
        self._ledger.note_answer_started(self)

    def note_resent(self) -> None:
        """Notes that the request is sent a second time, because a kept-alive connection ended at once."""
        self._ledger.note_resent(self)

    def note_slow_client(self) -> None:
        """Notes that the client takes the answer more slowly than the node sends it. So the answer's duration says
        nothing about the node."""
        if self.placement is not None:
            self.placement.placed.had_slow_client = True

    def set_abort_callback(self, abort: Callable[[], None]) -> None:
        """Sets the function that ``abort_attempt`` calls. After the lease's end it does nothing: there is no attempt
        that could be aborted."""
        if not self._released:
            self.abort_callback = abort

    def abort_attempt(self) -> None:
        """Ends the attempt at once instead of at its time-out, because the node no longer answers. An attempt that has
        not begun sees ``aborted`` and does not begin."""
        self.aborted = True
        if self.abort_callback is not None:
            self.abort_callback()
