"""``SlowNodes``: feeds the watch for slow nodes from the requests, and gives its verdicts to the accounts. Pure.

The forecasts of a slow node are multiplied by a factor (``NodeAccount.slowness``). An occasional request is still sent
there, so that we see when the node has recovered. Times are seconds of the caller's clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount, PlacedRequest
from gpumesh.balancer.experience import measure_stream_s
from gpumesh.balancer.outliers import OutlierWatch, Slowness
from gpumesh.balancer.policies.base import Choice, Question

# Added to the measured and to the forecast time of a first token. A node is not slow because 1 ms became 5 ms.
FIRST_TOKEN_FLOOR_S = 0.1
MOST_READS = 1.2  # prompts that were read at once, on the mean
MOST_STALLED = 0.25  # of the time of an answer
MIN_TOKENS = 16  # a shorter answer says little about the rate
UPDATE_INTERVAL_S = 0.1  # between two comparisons of all nodes, which take longer the more nodes there are


class SlowNodes:
    """``accounts`` are all nodes, by name; the owner adds to them."""

    def __init__(self, accounts: Mapping[str, NodeAccount]) -> None:
        self.watch = OutlierWatch()
        self._accounts = accounts
        self.slowed: set[str] = set()
        """The nodes whose account has a factor above 1."""
        self._updated_at = -math.inf  # when the speeds were compared last

    def __repr__(self) -> str:
        return f"<SlowNodes {', '.join(sorted(self.slowed)) or 'none'}>"

    def slowness(self, node: str, now: float) -> Slowness | None:
        """How slow the node is, for people; ``None`` if it is normal."""
        return self.watch.slowness(node, now)

    def forget(self, node: str) -> None:
        """Forgets a node, because its server is new. Nothing happens if there is no such node any more."""
        self.watch.forget(node)
        if node in self._accounts:
            self._accounts[node].slowness = 1.0
        self.slowed.discard(node)

    # -- what was measured ---------------------------------------------------------------------------------------

    def note_first_token(self, placed: PlacedRequest, now: float) -> None:
        """The answer has begun. Must be called once for each answer."""
        # The time of a load is no sign of slowness. If other prompts are read at the same time, the forecast is not
        # exact.
        account = placed.account
        if placed.needs_load or placed.mean_reads > MOST_READS or account.is_removed:
            return
        # The forecast of the reading contains the account's factor.
        read_s = (placed.begins_at - placed.sent_at - account.rtt_s) / account.slowness
        forecast_s = account.rtt_s + max(read_s, 0.0)
        measured_s = now - placed.sent_at
        self.watch.add_first_token(
            account.name, measured_s + FIRST_TOKEN_FLOOR_S, forecast_s + FIRST_TOKEN_FLOOR_S, now
        )
        self._update(now)

    def note_answer(
        self, placed: PlacedRequest, counters: ServerCounters, now: float, *, mean_streams: float, stalled_share: float
    ) -> None:
        """A whole answer has ended. ``mean_streams``: the mean number of answers that were written at the same time,
        this one included. ``stalled_share``: the share of the time in which the node read prompts, so that the answer
        stood still."""
        account, model, tokens = placed.account, placed.model, counters.tokens
        if counters.eval_ms is not None:
            eval_s: float | None = counters.eval_ms / 1000.0
        else:
            eval_s = measure_stream_s(placed, counters, now)
        if model is None or tokens is None or eval_s is None or tokens < MIN_TOKENS:
            return
        if stalled_share > MOST_STALLED:  # the time without the stalls is then not exact
            return
        eval_s = account.read_stall.clean(eval_s, stalled_share)
        alone_s = eval_s / (1.0 + account.rates.share(model) * (mean_streams - 1.0))
        if alone_s > 0.0:
            self.watch.add_decode_rate(account.name, model, tokens / alone_s, now)
            self._update(now)

    def _update(self, now: float) -> None:
        """Gives the factors of the slow nodes to their accounts."""
        if now < self._updated_at + UPDATE_INTERVAL_S:
            return
        self._updated_at = now
        factors = self.watch.factors(self._accounts.keys(), now)
        if not factors and not self.slowed:  # nearly always
            return
        for node in self.slowed.difference(factors):
            self._accounts[node].slowness = 1.0
        for node, factor in factors.items():
            account = self._accounts[node]
            account.slowness = max(factor / self._learned_slowness(account, now), 1.0)
        self.slowed = set(factors)

    def _learned_slowness(self, account: NodeAccount, now: float) -> float:
        """The part of the slowness that the account's learned rates contain already, as a factor. Without this
        correction it would count twice."""
        slowness = self.watch.slowness(account.name, now)
        if slowness is None or (slowness.decode or 0.0) < (slowness.first_token or 0.0):
            return 1.0  # the first token is late compared with the learned rates, so they do not contain this slowness
        shares = [
            account.rates.decode_s(model, 1.0) / token_s
            for model, token_s in self.watch.usual_token_s(account.name).items()
            if account.rates.is_measured(model)
        ]
        return max(shares, default=1.0)

    # -- probes --------------------------------------------------------------------------------------------------

    def find_probe(self, question: Question) -> Choice | None:
        """The choice of a slow node, if this request should go there to see whether the node has recovered; ``None``:
        the policy decides."""
        if not self.slowed:
            return None
        for account in question.accounts:
            if account.name in self.slowed and self.watch.wants_probe(
                account.name, question.now, in_flight=account.count()
            ):
                forecast = question.forecast(account)
                if forecast.is_free and not forecast.load_s:
                    return Choice(forecast, (forecast,))
        return None

    def record_choice(self, chosen: str, ranked: Iterable[NodeAccount], now: float) -> None:
        """Notes that the node ``chosen`` got a request for which the nodes ``ranked`` were compared."""
        if self.slowed:
            self.watch.record_choice(chosen, {account.name for account in ranked}, now)
