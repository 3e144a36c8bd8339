"""``KeyPlaces``: the places that one gateway holds and wants on the GPUs of one key. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from gpumesh.coordination.step_messages import KeyReply, Standing, StepCharge, StepKey, StepPlaceRequest

SAME_TIME_S = 0.05  # two announcements of one request have slightly different times
MAX_CHARGES = 1000  # that wait to be sent


class WaitingRequest(msgspec.Struct, frozen=True):
    """A request that takes or waits. ``client`` is a hash. ``queued_at`` is by this gateway's clock."""

    rank: int
    client: str
    limit: int
    queued_at: float
    cost: float

    def is_same(self, other: WaitingRequest) -> bool:
        """Whether both stand for one request, or for two that nobody could tell apart."""
        return (
            (self.rank, self.client, self.limit, self.cost) == (other.rank, other.client, other.limit, other.cost)
        ) and abs(self.queued_at - other.queued_at) < SAME_TIME_S

    def to_message(self, now: float) -> StepPlaceRequest:
        return StepPlaceRequest(self.rank, self.client, self.limit, max(now - self.queued_at, 0.0), self.cost)


class Take:
    """A request that asks for a place. ``settle`` is called once with the answer, unless the take was cancelled.
    ``wait_until``: for so long it waits for the owner of the key."""

    __slots__ = ("is_cancelled", "request", "settle", "wait_until")

    def __init__(self, request: WaitingRequest, settle: Callable[[bool], None], wait_until: float) -> None:
        self.request = request
        self.settle = settle
        self.wait_until = wait_until
        self.is_cancelled = False


class KeyPlaces:
    """Times are seconds of the caller's clock.

    - ``held``: the places that this gateway's requests have. ``grants``: the classes of waiting requests that got a
      place in this turn; the place is not held yet.
    - ``owns``: this gateway uses the key alone, so it asks nobody.
    - ``others``: the places of the other gateways. ``is_closed``: a place was denied, and nothing has changed since.
    - ``freed``: the places that this gateway has given back, and that Redis may still count.
    - ``is_dirty``: something must be told to Redis at once. ``tells_soon``: only that a place was given back, for which
      nobody is known to wait: that is told with the next step, or a moment later.
    """

    def __init__(self, key: str, now: float) -> None:
        self.key = key
        self.held = 0
        self.grants: list[int] = []
        self.owns = False
        self.others = 0
        self.is_closed = False
        self.freed = 0
        self.is_dirty = self.tells_soon = False
        self.used_at = now
        self.takes: list[Take] = []  # not sent yet
        self.heads: tuple[WaitingRequest, ...] = ()
        self._others_wait = False  # by the last answer
        self._sent_takes: list[Take] = []  # in the step that is in flight
        self._sent_freed = 0  # the part of ``freed`` that the step in flight tells
        self._parked: list[Take] = []  # wait until the owner shares the key
        self._gives_up = False  # to be told: this gateway does not use the key alone any more
        self._granted_heads: tuple[WaitingRequest, ...] = ()  # what was announced when ``grants`` came
        self._withholds_heads = False  # the announced requests did not take the place that they got
        self._charges: list[StepCharge] = []

    def __repr__(self) -> str:
        standing = "alone" if self.owns else "closed" if self.is_closed else "shared"
        return f"<KeyPlaces {self.key} {standing} {self.held} held, {self.others} of others>"

    # -- what the mesh asks and tells ----------------------------------------------------------------------------

    def others_in_flight(self, own: int, limit: int | None) -> int:
        """As ``Coordination.others_in_flight``, while the gateways share."""
        if self.owns:
            return self.others
        counted = self.others + self.freed
        if self.is_closed and limit is not None:  # there is room only for what was granted
            return max(counted, limit - own - len(self.grants))
        return counted

    def use_grant(self) -> bool:
        """Takes a granted place, if there is one."""
        if not self.grants:
            return False
        self.grants.pop()
        self.held += 1
        return True

    def release(self, *, is_shared: bool) -> None:
        """Gives a place back. ``is_shared``: Redis must be told."""
        self.held = max(self.held - 1, 0)
        if is_shared and not self.owns:
            self.freed += 1
            self.tells_soon = True
            self.is_dirty |= self._others_wait or bool(self.heads)

    def charge(self, charge: StepCharge) -> None:
        if len(self._charges) < MAX_CHARGES:
            self._charges.append(charge)

    def announce(self, heads: tuple[WaitingRequest, ...]) -> bool:
        """Stores the best waiting requests. Returns whether they have changed."""
        if len(heads) == len(self.heads) and all(map(WaitingRequest.is_same, heads, self.heads)):
            return False
        self.heads = heads
        self._withholds_heads = False
        return True

    def cancel(self, take: Take) -> None:
        """The take's request has gone. If the step in flight asks for its place, the place is given back later."""
        take.is_cancelled = True
        for takes in (self.takes, self._parked):
            if take in takes:
                takes.remove(take)

    # -- what is told to Redis -----------------------------------------------------------------------------------

    def is_idle(self, now: float, forget_s: float) -> bool:
        """Whether this gateway has nothing there, and has not used the key for ``forget_s``."""
        has_any = self.held or self.grants or self.heads or self.takes or self._sent_takes or self._parked
        return not has_any and now - self.used_at > forget_s

    def build_message(self, now: float, *, is_heartbeat: bool, forgets: bool) -> StepKey:
        """What must be told now. The answer goes to ``apply``; no other message may be built before it."""
        if is_heartbeat:
            self._withholds_heads = False
        if self.held or self.grants or self.heads or self.takes:
            self.used_at = now
        if forgets:
            self._gives_up, self.owns = True, False
        self._sent_takes, self.takes = self.takes, []
        self._sent_freed = self.freed
        heads = () if self._withholds_heads else self.heads
        message = StepKey(
            key=self.key,
            held=self.held + len(self.grants),
            takes=[take.request.to_message(now) for take in self._sent_takes],
            heads=[head.to_message(now) for head in heads],
            charges=self._charges,
            idle_s=max(now - self.used_at, 0.0),
            gives_up=self._gives_up,
        )
        self._charges = []
        self._gives_up = False
        self.is_dirty = self.tells_soon = False
        return message

    # -- what Redis answers --------------------------------------------------------------------------------------

    def apply(self, reply: KeyReply, now: float) -> bool:
        """Takes over the answer to the last message. Returns whether the mesh must look at the key again. Raises
        ValueError if the reply does not fit the message."""
        takes = self._sent_takes
        if len(reply.granted) != len(takes):
            raise ValueError("the reply does not fit the request")
        before = self._visible_state()
        self._sent_takes = []
        self.freed -= self._sent_freed
        self._sent_freed = 0
        self.others = reply.others
        self._others_wait = reply.others_wait
        if reply.standing is Standing.OWNED_BY_OTHER:
            self.owns = False
            self._parked += takes
            self.is_closed = bool(self._parked) or (self.is_closed and bool(self.heads))
            self.expire_takes(now)
        else:
            self.owns = reply.standing is Standing.OWN and not self._gives_up
            for take, is_granted in zip(takes, reply.granted, strict=True):
                self._settle(take, is_granted=is_granted)
            was_denied = not all(reply.granted)
            self.is_closed = not self.owns and (was_denied or (self.is_closed and reply.others_wait))
            self.take_again()
            self.add_grants(reply.grants)
        if self.owns:
            self.freed = 0
            self._grant_all(self.takes)
        return before != self._visible_state()

    def forget_sent(self) -> None:
        """The last message had no effect: its takes ask again."""
        self.takes = [take for take in self._sent_takes if not take.is_cancelled] + self.takes
        self._sent_takes = []
        self._sent_freed = 0

    def add_grants(self, ranks: Sequence[int]) -> None:
        """Waiting requests of these classes got a place. ``return_unused_grants`` must be called in the same turn."""
        if ranks:
            self.grants += ranks
            self._granted_heads = self.heads
            self.is_dirty = True  # Redis does not have these waiting requests any more, and gets the next ones

    def return_unused_grants(self) -> None:
        """Gives back what was granted and not taken. If the same requests still wait, they are announced again only at
        the next heartbeat: else they would get the same place again at once."""
        if self.grants:
            self.grants.clear()
            self._withholds_heads = self.heads == self._granted_heads

    def take_again(self) -> None:
        """The owner has shared the key, or has gone: the takes that waited for it ask again."""
        if self._parked:
            self.takes += self._parked
            self._parked = []
            self.is_dirty = True

    def give_up(self) -> None:
        """Another gateway wants to use the key: from now on this one asks for places too."""
        self.owns = False
        self._gives_up = True
        self.is_dirty = True

    def expire_takes(self, now: float) -> None:
        """Denies the takes that have waited long enough for the owner of the key."""
        for take in [take for take in self._parked if take.wait_until <= now]:
            self._parked.remove(take)
            self.is_closed = True
            self._settle(take, is_granted=False)

    def next_expiry(self) -> float | None:
        """When ``expire_takes`` is due; ``None``: nothing waits for an owner."""
        return min((take.wait_until for take in self._parked), default=None)

    def start_joining(self) -> None:
        """What Redis knows of this gateway is void."""
        self.forget_sent()
        self.take_again()
        self.owns = self.is_closed = self._gives_up = self._withholds_heads = False
        self.is_dirty = True

    def go_alone(self) -> None:
        """The other gateways cannot be asked: all takes are granted."""
        self.start_joining()
        self.others = self.freed = 0
        self.grants.clear()
        self._charges = []
        self._grant_all(self.takes)

    def _grant_all(self, takes: list[Take]) -> None:
        waiting = takes.copy()
        takes.clear()
        for take in waiting:
            self._settle(take, is_granted=True)

    def _settle(self, take: Take, *, is_granted: bool) -> None:
        if take.is_cancelled:
            self.is_dirty |= is_granted  # tells Redis that the place is not held
            return
        self.held += is_granted
        take.settle(is_granted)

    def _visible_state(self) -> tuple[bool, bool, int, int]:
        return self.owns, self.is_closed, self.others + self.freed, len(self.grants)
