"""``Places``: the places that one gateway holds and wants on all keys, and what it tells Redis of them. Pure.

The link (``several_gateways.py``) sends what ``build_messages`` returns, one step at a time, and gives the answer to
``apply``. Each message says all that the gateway holds and wants of a key, not what has changed. So a step that was
lost, or that Redis has forgotten, is made good by the next one. Times are seconds of the caller's clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum

from gpumesh.balancer.base import Priority
from gpumesh.balancer.fairness.lane import RANKS
from gpumesh.coordination.base import PlaceRequest
from gpumesh.coordination.client_hashes import hash_client
from gpumesh.coordination.key_places import KeyPlaces, Take, WaitingRequest
from gpumesh.coordination.step_messages import NO_LIMIT, KeyReply, Mail, MailKind, StepCharge, StepKey
from gpumesh.coordination.timing import Timing


class LinkState(StrEnum):
    """``ALONE``: the other gateways cannot be asked. ``JOINING``: Redis gets to know this gateway; takes wait for it.
    ``JOINED``: the gateways share places."""

    ALONE = "alone"
    JOINING = "joining"
    JOINED = "joined"


class Places:
    """``mesh`` is the mesh's name, which the hashes of clients depend on. ``on_wanted`` is called when there is
    something to tell Redis."""

    def __init__(self, mesh: str, *, clock: Callable[[], float], on_wanted: Callable[[], None], timing: Timing) -> None:
        self.state = LinkState.ALONE
        self.session = 0  # grows with each registration
        self.seen = 0  # the number of the newest mail of this session
        self._mesh = mesh
        self._clock = clock
        self._on_wanted = on_wanted
        self._timing = timing
        self._keys: dict[str, KeyPlaces] = {}
        self._sent: list[KeyPlaces] = []  # the keys of the step that is in flight
        self._sent_at = 0.0
        self._forgotten: list[KeyPlaces] = []  # the keys that the step in flight lets go
        self._own_until = 0.0  # until then this gateway may rely on using keys alone
        self._next_heartbeat_at = 0.0
        self._soon_at: float | None = None  # when places that were given back are told at the latest
        self._wants_step = False  # the next step brings what was missed

    def __repr__(self) -> str:
        return f"<Places {self.state} session {self.session}, {len(self._keys)} keys>"

    # -- for the mesh --------------------------------------------------------------------------------------------

    def take_now(self, key: str) -> bool | None:
        """As ``Coordination.take_now``."""
        places = self._keys.get(key)
        if self.state is LinkState.ALONE:
            self._of(key).held += 1
            return True
        if places is None:
            return None
        if places.grants:
            return places.use_grant()
        if places.owns:
            now = self._clock()
            if now < self._own_until:
                places.held += 1
                places.used_at = now
                return True
            return None
        return None

    def take(self, key: str, request: PlaceRequest, settle: Callable[[bool], None]) -> Take | None:
        """Asks for a place; ``settle`` is called with the answer. ``None``: it was called already."""
        now = self._clock()
        places = self._of(key)
        take = Take(self._waiting_request(request, now), settle, now + self._timing.owner_s)
        is_free = request.limit is None or (places.owns and now < self._own_until)
        if self.state is LinkState.ALONE or is_free:
            places.held += 1
            self._mark(places, is_dirty=not places.owns)
            settle(True)
            return None
        places.takes.append(take)
        self._mark(places)
        return take

    def cancel(self, key: str, take: Take) -> None:
        """The request of a take whose answer has not come has gone."""
        self._of(key).cancel(take)

    def hold(self, key: str) -> None:
        """As ``Coordination.hold``."""
        places = self._of(key)
        places.held += 1
        places.used_at = self._clock()
        self._mark(places, is_dirty=not places.owns)

    def release(self, key: str, priority: Priority, client: str, cost_correction: float) -> None:
        """As ``Coordination.release``."""
        places = self._of(key)
        is_shared = self.state is not LinkState.ALONE
        places.release(is_shared=is_shared)
        places.used_at = self._clock()
        if cost_correction and is_shared and not places.owns:
            places.charge(StepCharge(RANKS[priority], hash_client(self._mesh, client), cost_correction))
        if places.tells_soon and self._soon_at is None:
            self._soon_at = places.used_at + self._timing.release_s
        if places.is_dirty or places.tells_soon:
            self._mark(places, is_dirty=places.is_dirty)

    def others_in_flight(self, key: str, own: int, limit: int | None) -> int:
        """As ``Coordination.others_in_flight``."""
        places = self._keys.get(key)
        if places is None or self.state is LinkState.ALONE:
            return 0
        return places.others_in_flight(own, limit)

    def announce(self, key: str, heads: Sequence[PlaceRequest]) -> None:
        """As ``Coordination.announce``."""
        if not heads and key not in self._keys:
            return
        now = self._clock()
        best: dict[int, WaitingRequest] = {}
        for head in heads:
            best.setdefault(RANKS[head.priority], self._waiting_request(head, now))
        places = self._of(key)
        if places.announce(tuple(best[rank] for rank in sorted(best))):
            self._mark(places, is_dirty=not places.owns)

    def shared_keys(self) -> list[str]:
        """As ``Coordination.shared_keys``."""
        if self.state is LinkState.ALONE:
            return []
        return [key for key, places in self._keys.items() if not places.owns]

    def held(self) -> dict[str, int]:
        """The places that this gateway holds, by key."""
        return {key: places.held for key, places in self._keys.items() if places.held}

    # -- for the link: to Redis ----------------------------------------------------------------------------------

    def next_step_at(self) -> float:
        """When a step is due; in the past if there is something to tell already."""
        has_news = self._wants_step or any(places.is_dirty for places in self._keys.values())
        if has_news or self.state is LinkState.JOINING:
            return 0.0
        return self._next_heartbeat_at if self._soon_at is None else min(self._soon_at, self._next_heartbeat_at)

    def is_heartbeat_due(self) -> bool:
        """Whether the next step says everything, not only what has changed."""
        return self.state is LinkState.JOINING or self._clock() >= self._next_heartbeat_at

    def next_expiry(self) -> float | None:
        """When ``expire`` is due; ``None``: no take waits for the owner of its key."""
        times = [places.next_expiry() for places in self._keys.values()]
        return min((time for time in times if time is not None), default=None)

    def expire(self) -> set[str]:
        """Denies the takes whose owners did not share in time. Returns the keys at which the mesh must look again."""
        now = self._clock()
        due = [places for places in self._keys.values() if (time := places.next_expiry()) is not None and time <= now]
        for places in due:
            places.expire_takes(now)
        return {places.key for places in due}

    def build_messages(self, *, is_heartbeat: bool) -> list[StepKey]:
        """What the next step says. Before the next call, ``apply`` must be called with its answer, or
        ``start_joining`` or ``go_alone``."""
        now = self._clock()
        if is_heartbeat:
            self._next_heartbeat_at = now + self._timing.heartbeat_s
        self._soon_at = None
        self._sent = [places for places in self._keys.values() if is_heartbeat or places.is_dirty or places.tells_soon]
        self._forgotten = [places for places in self._sent if places.is_idle(now, self._timing.forget_s)]
        self._sent_at = now
        self._wants_step = False
        return [
            places.build_message(now, is_heartbeat=is_heartbeat, forgets=places in self._forgotten)
            for places in self._sent
        ]

    # -- for the link: from Redis --------------------------------------------------------------------------------

    def apply(self, replies: Sequence[KeyReply], mail: Iterable[Mail]) -> set[str]:
        """Takes over the answer to the step. Returns the keys at which the mesh must look again. Afterwards
        ``return_unused_grants`` must be called. Raises ValueError if the answer does not fit the step."""
        if len(replies) != len(self._sent):
            raise ValueError("the reply does not fit the request")
        now = self._clock()
        has_joined = self.state is LinkState.JOINING
        self.state = LinkState.JOINED
        self._own_until = self._sent_at + self._timing.own_s
        changed = {
            places.key
            for places, reply in zip(self._sent, replies, strict=True)
            if places.apply(reply, now) or has_joined
        }
        for places in self._forgotten:
            if places.is_idle(now, self._timing.forget_s):
                self._keys.pop(places.key, None)
        self._sent, self._forgotten = [], []
        for item in mail:
            changed |= self.receive(self.session, item)
        return changed

    def receive(self, session: int, mail: Mail) -> set[str]:
        """Takes mail, which may come twice: by publish/subscribe and with the answer to a step. Returns the keys at
        which the mesh must look again. Afterwards ``return_unused_grants`` must be called."""
        if session != self.session or mail.number <= self.seen or self.state is LinkState.ALONE:
            return set()
        if mail.number > self.seen + 1 or self.state is LinkState.JOINING:  # too early: the next step brings it again
            self.want_step()
            return set()
        self.seen = mail.number
        if mail.kind is MailKind.SYNC:
            for places in self._keys.values():
                self._mark(places)
            return set()
        places = self._of(mail.key)
        if mail.kind is MailKind.GRANT:
            places.others = mail.others
            places.add_grants([mail.rank])
        elif mail.kind is MailKind.SHARE:
            places.give_up()
        else:
            places.is_closed = False
            places.take_again()
        self._mark(places)
        return {mail.key}

    def want_step(self) -> None:
        """Lets a step be done at once, although nothing has changed here."""
        if self.state is not LinkState.ALONE:
            self._wants_step = True
            self._on_wanted()

    def has_grants(self) -> bool:
        """Whether there are granted places that the mesh must take in this turn."""
        return any(places.grants for places in self._keys.values())

    def return_unused_grants(self) -> None:
        """Gives back the places that were granted and that the mesh did not take."""
        for places in self._keys.values():
            places.return_unused_grants()

    def start_joining(self) -> None:
        """Redis does not know this gateway, or not any more: the next step registers it anew."""
        self.state = LinkState.JOINING
        self.session += 1
        self.seen = 0
        self._sent, self._forgotten = [], []
        for places in self._keys.values():
            places.start_joining()

    def go_alone(self) -> set[str]:
        """The other gateways cannot be asked. Returns the keys at which the mesh must look again."""
        if self.state is LinkState.ALONE:
            return set()
        self.state = LinkState.ALONE
        self._sent, self._forgotten = [], []
        for places in self._keys.values():
            places.go_alone()
        return set(self._keys)

    def _of(self, key: str) -> KeyPlaces:
        places = self._keys.get(key)
        if places is None:
            places = self._keys[key] = KeyPlaces(key, self._clock())
        return places

    def _mark(self, places: KeyPlaces, *, is_dirty: bool = True) -> None:
        """Notes that there is something to tell of the key."""
        places.is_dirty |= is_dirty
        if (places.is_dirty or places.tells_soon) and self.state is not LinkState.ALONE:
            self._on_wanted()

    def _waiting_request(self, request: PlaceRequest, now: float) -> WaitingRequest:
        limit = NO_LIMIT if request.limit is None else max(request.limit, 0)
        client = hash_client(self._mesh, request.client)
        return WaitingRequest(RANKS[request.priority], client, limit, now - request.waited_s, request.cost)
