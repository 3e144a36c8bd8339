"""``OtherGateways``: the other gateways of the mesh that are heard, and what holds as long as they are heard. Pure.

Times are monotonic seconds of the caller's clock.
"""

from __future__ import annotations

from gpumesh.coordination.facts.messages import Presence

SILENT_S = 3.5  # a gateway that is silent for longer has ended: two or three lost messages do no harm
# While Redis is away, nobody is heard. What the others have drained holds for so long, because Redis is usually back
# soon, and then they are heard again.
AWAY_S = 60.0
MAX_GATEWAYS = 256


class _HeardGateway:
    """The last presence of a gateway, and the time when it came."""

    __slots__ = ("heard_at", "presence")

    def __init__(self, presence: Presence, heard_at: float) -> None:
        self.presence = presence
        self.heard_at = heard_at


class OtherGateways:
    """The other gateways, by their ids."""

    def __init__(self) -> None:
        self._heard: dict[str, _HeardGateway] = {}  # by id; the gateway that is silent for the longest time comes first
        self._hearing_since: float | None = None  # ``None``: Redis is away
        self._away_since = 0.0

    def __repr__(self) -> str:
        return f"<OtherGateways {len(self._heard)} known, {'heard' if self._hearing_since is not None else 'away'}>"

    def receive(self, gateway: str, presence: Presence, now: float) -> bool:
        """Takes the presence of a gateway. Returns whether it tells more than that the gateway still lives and how many
        requests it has: a gateway that begins or ends, or other drained servers."""
        before = self._heard.pop(gateway, None)  # so that the new entry comes last
        while len(self._heard) >= MAX_GATEWAYS:
            del self._heard[next(iter(self._heard))]
        self._heard[gateway] = _HeardGateway(presence, now)
        return before is None or before.presence.drained != presence.drained

    def forget(self, gateway: str) -> bool:
        """Forgets a gateway that has ended. Returns whether it was known."""
        return self._heard.pop(gateway, None) is not None

    def knows(self, gateway: str) -> bool:
        """Whether this gateway is heard."""
        return gateway in self._heard

    @property
    def is_any_heard(self) -> bool:
        """Whether there are other gateways, which can be reached now."""
        return self._hearing_since is not None and bool(self._heard)

    def note_connection(self, *, is_up: bool, now: float) -> None:
        """Notes whether messages of others can come. Called at least once a second."""
        if is_up and self._hearing_since is None:
            self._hearing_since = now
        elif not is_up and self._hearing_since is not None:
            self._hearing_since, self._away_since = None, now

    def forget_silent(self, now: float) -> bool:
        """Forgets the gateways that are silent. Returns whether there were any."""
        if self._hearing_since is None:
            silent = list(self._heard) if now - self._away_since > AWAY_S else []
        else:
            # A gateway that could not be heard for a time gets the same time to be heard again.
            since = self._hearing_since
            silent = [name for name, heard in self._heard.items() if now - max(heard.heard_at, since) > SILENT_S]
        for name in silent:
            del self._heard[name]
        return bool(silent)

    def presences(self) -> dict[str, Presence]:
        """What each other gateway has told last, in the order of their beginning. Empty while Redis is away."""
        if self._hearing_since is None:
            return {}
        presences = {gateway: heard.presence for gateway, heard in self._heard.items()}
        return dict(sorted(presences.items(), key=lambda item: (item[1].since, item[0])))

    def drains(self) -> dict[str, dict[str, str]]:
        """For each drained server, the gateways at which it is drained: the names of their machines, by their ids."""
        drains: dict[str, dict[str, str]] = {}
        for gateway, heard in self._heard.items():
            for server in heard.presence.drained:
                drains.setdefault(server, {})[gateway] = heard.presence.host
        return drains
