"""Frozen snapshots of what the balancer knows of a node, and of what it has decided. A part of ``gpumesh.state``.

Each field is a key of the JSON document ``gpumesh.status/1`` (docs/status-json.md), as in ``gpumesh.state``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LearnedState:
    """What was learned about a model on a node. ``None``: not measured there.

    ``tokens_per_s`` of a stream that runs alone; each stream beside it makes a token take ``neighbour_share`` longer
    (0.2: with one neighbour 1.2 times as long). ``prefill_tokens_per_s``: how fast a prompt is read that is not in the
    server's cache. ``load_s``: how long a load takes. ``slots``: the proven number of requests that run at once.
    """

    model: str
    tokens_per_s: float | None = None
    neighbour_share: float | None = None
    prefill_tokens_per_s: float | None = None
    load_s: float | None = None
    slots: int | None = None


@dataclass(frozen=True, slots=True)
class DecisionState:
    """A request that the node has answered. ``why`` is the forecast that chose the node, as a sum of its parts.

    ``forecast_s`` is the time that the request was to take there, ``actual_s`` the time that it has taken. It ended
    ``age_s`` ago.
    """

    model: str | None
    age_s: float
    forecast_s: float
    actual_s: float
    why: str


@dataclass(frozen=True, slots=True)
class ModelLoadsState:
    """The loads of one model. ``contexts`` are the different contexts (``num_ctx``) that the requests asked for;
    ``None`` among them: the server's default."""

    name: str
    loads: int
    contexts: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadingState:
    """The loads on a node that requests of this mesh have caused in the last minutes.

    ``window_s`` is the time since the first of these ``loads``, ``load_s`` how much of it the node has spent loading.
    """

    window_s: float
    load_s: float
    loads: int
    models: tuple[ModelLoadsState, ...] = ()
