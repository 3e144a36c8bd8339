"""Learns how long answers are: the mean number of tokens by client, route and model. Pure.

A client's ``max_tokens`` is a cap and no forecast: most clients set it far above what they get. Answers to the same
client on the same route with the same model are alike, so their mean is the forecast. If a mean has few answers, a more
general mean has more weight in the forecast. The order is: (client, route, model), then (route, model), then the route,
then all answers, then ``DEFAULT_TOKENS``.
"""

from __future__ import annotations

from collections import OrderedDict

DEFAULT_TOKENS = 256.0
MAX_TOKENS = 1 << 20  # a longer answer counts as an answer of this length
PRIOR_ANSWERS = 3.0  # the weight of the more general mean, in answers
MEMORY_ANSWERS = 50  # with more answers than this, old answers are gradually forgotten
MAX_FORECASTS = 1000  # kept until the next answer; with more, a new forecast is not kept
MAX_CLIENTS = 1000  # with more, the client that has not asked for the longest time is forgotten
MAX_PER_CLIENT = 16  # pairs of route and model of one client
MAX_ROUTES = 1000  # pairs of route and model, and routes
MAX_KEY_CHARS = 200  # of a name that a client gives itself


class _Mean:
    """The mean of the lengths of answers."""

    __slots__ = ("answers", "tokens")

    def __init__(self) -> None:
        self.answers = 0
        self.tokens = 0.0

    def add(self, tokens: float) -> None:
        """Adds an answer. After ``MEMORY_ANSWERS`` answers, each new answer moves the mean by the same share."""
        self.answers = min(self.answers + 1, MEMORY_ANSWERS)
        self.tokens += (tokens - self.tokens) / self.answers

    def shrink_towards(self, general: float) -> float:
        """The mean over these answers, and over ``PRIOR_ANSWERS`` more whose mean is ``general``."""
        return (self.answers * self.tokens + PRIOR_ANSWERS * general) / (self.answers + PRIOR_ANSWERS)


_Means = OrderedDict[tuple[str, str], _Mean]
"""Means by route and model, the mean that was used last at the end."""


class ExpectedLengths:
    """Forecasts the number of tokens of an answer. A mesh has one: lengths depend on who asks, not on the node.

    ``client`` is the client's name, ``route`` the path, ``model`` the model's full name.
    """

    def __init__(self) -> None:
        self._all = _Mean()
        self._routes: _Means = OrderedDict()  # the key's model is "": the mean over all models
        self._clients: OrderedDict[str, _Means] = OrderedDict()
        self._forecasts: dict[tuple[str, str, str], float] = {}  # by client, route, model; made since the last answer

    def __repr__(self) -> str:
        return f"<ExpectedLengths {self._all.tokens:.0f} tokens, {len(self._clients)} clients>"

    def learn(self, client: str, route: str, model: str, tokens: int) -> None:
        """Adds an answer of this number of tokens. A negative number is ignored."""
        if tokens < 0:
            return
        self._forecasts.clear()
        length = float(min(tokens, MAX_TOKENS))
        client, route, model = client[:MAX_KEY_CHARS], route[:MAX_KEY_CHARS], model[:MAX_KEY_CHARS]
        self._all.add(length)
        _find_or_add(self._routes, (route, ""), MAX_ROUTES).add(length)
        _find_or_add(self._routes, (route, model), MAX_ROUTES).add(length)
        means = self._clients.get(client)
        if means is None:
            means = self._clients[client] = OrderedDict()
            if len(self._clients) > MAX_CLIENTS:
                self._clients.popitem(last=False)
        else:
            self._clients.move_to_end(client)
        _find_or_add(means, (route, model), MAX_PER_CLIENT).add(length)

    def expect(self, client: str, route: str, model: str, max_tokens: int | None = None) -> float:
        """The expected number of tokens of an answer, at most ``max_tokens``; ``None``: the client sets no maximum."""
        forecast_key = (client, route, model)
        expected = self._forecasts.get(forecast_key)
        if expected is None:
            expected = self._expect(client, route, model)
            if len(self._forecasts) < MAX_FORECASTS:
                self._forecasts[forecast_key] = expected
        if max_tokens is None or max_tokens < 0:  # Ollama takes a negative number as no maximum
            return expected
        return float(min(expected, max_tokens))  # ``min`` first: a client may write a number too large for a float

    def _expect(self, client: str, route: str, model: str) -> float:
        """The expected number of tokens without a maximum: the means are combined from the most general to the most
        special."""
        route = route[:MAX_KEY_CHARS]
        key = (route, model[:MAX_KEY_CHARS])
        expected = self._all.shrink_towards(DEFAULT_TOKENS)
        route_mean = self._routes.get((route, ""))
        if route_mean is not None:
            expected = route_mean.shrink_towards(expected)
            model_mean = self._routes.get(key)
            if model_mean is not None:
                expected = model_mean.shrink_towards(expected)
        client_means = self._clients.get(client[:MAX_KEY_CHARS])
        client_mean = None if client_means is None else client_means.get(key)
        return expected if client_mean is None else client_mean.shrink_towards(expected)


def remaining(expected: float, done: float, max_tokens: int | None = None) -> float:
    """The number of tokens that an answer will probably still get. It has ``done`` tokens already, and ``expected`` was
    its forecast.

    An answer near or past its expected length is not about to end: it is probably a long answer. We expect that it gets
    half of its present tokens more, which is the mean residual life of a Pareto distribution with the exponent 3. So
    the answer counts as at least 1.5 times as long as it is now. ``max_tokens`` is the client's maximum; ``None`` or a
    negative number: none.
    """
    remaining_tokens = max(expected - done, done / 2.0)
    if max_tokens is None or max_tokens < 0:
        return remaining_tokens
    return max(min(done + remaining_tokens, max_tokens) - done, 0.0)


def _find_or_add(means: _Means, key: tuple[str, str], max_keys: int) -> _Mean:
    """The mean of this key, which becomes the last one used. Adds an empty mean if there is none. With more than
    ``max_keys`` keys, the key that was used longest ago is forgotten."""
    mean = means.get(key)
    if mean is None:
        mean = means[key] = _Mean()
        if len(means) > max_keys:
            means.popitem(last=False)
    else:
        means.move_to_end(key)
    return mean
