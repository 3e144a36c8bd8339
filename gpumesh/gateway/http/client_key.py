"""``ClientKey``: the API key with which a request came, and what its holder may use."""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.gateway.http.errors import BadRequest
from gpumesh.topology import Priority, RequestRate


@dataclass(frozen=True, slots=True)
class ClientKey:
    """A key, without its secret.

    - ``label`` names the key for the connections that use it, and is never a secret.
    - ``name`` is the name of its holder; ``None`` for the key of ``gateway.api_key_env``, which many may hold.
    - ``priority``: the class of a request that asks for none; ``None``: this key changes nothing.
    - ``nodes`` and ``models`` are all that the holder may use; ``None``: no limit. The models are compared by
      ``ModelRules.identity``.
    - ``rate`` and ``tokens_per_month``: how much the holder may use (``access/quotas.py``); ``None``: no limit.
    """

    label: str
    name: str | None = None
    priority: Priority | None = None
    nodes: frozenset[str] | None = None
    models: frozenset[str] | None = None
    rate: RequestRate | None = None
    tokens_per_month: int | None = None

    @property
    def usage_name(self) -> str:
        """The name under which usage is counted. A key without a holder's name is that of a variable (``$NAME``)."""
        return f"${self.label}" if self.name is None else self.name

    @property
    def has_quota(self) -> bool:
        """Whether the holder may use a limited amount only."""
        return self.rate is not None or self.tokens_per_month is not None

    @property
    def is_limited(self) -> bool:
        """Whether the holder may use a part of the mesh only."""
        return self.nodes is not None or self.models is not None

    def allows_model(self, identity: str) -> bool:
        """Whether the holder may use the model with this ``ModelRules.identity``."""
        return self.models is None or identity in self.models

    def require_node(self, node: str | None) -> None:
        """Raises BadRequest if the holder may not use the node that the client names; ``None``: it names none."""
        if node is not None and self.nodes is not None and node not in self.nodes:
            raise _forbidden(f"this key may not use node {node!r}; it may use: {', '.join(sorted(self.nodes))}")

    def require_model(self, model: str, identity: str) -> None:
        """Raises BadRequest if the holder may not use this model. ``identity``: its ``ModelRules.identity``."""
        if not self.allows_model(identity):
            allowed = ", ".join(sorted(self.models or ()))
            raise _forbidden(f"this key may not use model {model[:100]!r}; it may use: {allowed}")

    def require_all(self) -> None:
        """Raises BadRequest if the holder may use a part of the mesh only: the request concerns all of it."""
        if self.is_limited:
            raise _forbidden("this key is limited to some nodes or models, and may not change the mesh")

    def require_known_route(self) -> None:
        """Raises BadRequest if the holder may use a part of the mesh only: it is not known what the route does."""
        if self.is_limited:
            raise _forbidden(
                "this key is limited to some nodes or models, and gpumesh does not know what this route does"
            )

    def require_readable_body(self) -> None:
        """Raises BadRequest if the holder may use a part of the mesh only. It is for a body that we cannot read: a
        server may read it, and find another model there."""
        if self.is_limited:
            raise _forbidden("this key is limited to some nodes or models, and gpumesh cannot read the request's body")


def _forbidden(message: str) -> BadRequest:
    return BadRequest(message, status=403)
