"""``Router``: finds the handler of a request by its path and method, or forwards the request to a node.

There are four sorts of routes. Requests to ``MODEL_ROUTES`` go to a node that has the model (``model_forwarding``).
Requests to ``ANY_NODE_ROUTES`` go to any node. Requests to routes that no table has go to a node that has the model
that their body names (``find_model_route``). All other requests are answered by a handler: ``fleet_routes`` for
questions about the whole fleet, ``model_store_routes`` for changes of model stores, ``page/`` for the web page,
``batches/`` for files and batches.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping

from msgspec.structs import replace

from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import RequestOutcome
from gpumesh.batches.base import BatchStore
from gpumesh.gateway import proxy
from gpumesh.gateway.access.client_names import ClientNames
from gpumesh.gateway.access.quotas import KeyQuotas
from gpumesh.gateway.batches import routes as batch_routes
from gpumesh.gateway.error_shapes import error_reply
from gpumesh.gateway.fleet_routes import FleetRoutes
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Handler, Request
from gpumesh.gateway.http.responses import Response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.gateway.model_forwarding import ModelForwarder
from gpumesh.gateway.model_requests import (
    ALL_KINDS,
    MODEL_ROUTES,
    OLLAMA_ONLY,
    OTHER_ROUTE,
    find_client_api,
    find_model_route,
    read_node,
)
from gpumesh.gateway.model_store_routes import ModelStoreRoutes
from gpumesh.gateway.observe.record import RequestRecord
from gpumesh.gateway.page.web_page import UI_PATH, UiPage
from gpumesh.mesh.mesh import Mesh
from gpumesh.topology import GatewaySpec

ANY_NODE_TIMEOUT_S = 30.0
OPENAI_MODEL_PREFIX = "/v1/models/"

_GET = ("GET", "HEAD")
_POST = ("POST",)
_DELETE = ("DELETE",)
_HEAD = ("HEAD",)

ANY_NODE_ROUTES: Mapping[str, tuple[str, ...]] = {
    "/v1/models/{model}": _GET,
    "/api/status": _GET,
    "/api/me": _POST,
    "/api/signout": _POST,
}
# All paths that begin with the prefix share one template, in the tables here and in metrics.
_TEMPLATE_BY_PREFIX = {
    OPENAI_MODEL_PREFIX: "/v1/models/{model}",
    "/api/blobs/": "/api/blobs/{digest}",
    "/mesh/nodes/": "/mesh/nodes/{node}/{action}",
    "/mesh/requests/": "/mesh/requests/{number}/cancel",
    **batch_routes.TEMPLATE_BY_PREFIX,
}
HandlersByMethod = tuple[tuple[tuple[str, ...], Handler], ...]
"""Pairs of methods and their handler."""


class Router:
    """The gateway's routes over one mesh. ``batch_store``: of the routes for batches; ``None``: there are none."""

    def __init__(
        self,
        mesh: Mesh,
        fleet_routes: FleetRoutes,
        model_store_routes: ModelStoreRoutes,
        page: UiPage,
        client_names: ClientNames,
        quotas: KeyQuotas,
        batch_store: BatchStore | None = None,
    ) -> None:
        self._mesh = mesh
        self._fleet_routes = fleet_routes
        self._forwarder = ModelForwarder(mesh, client_names, quotas)
        self._handlers = _handler_table(fleet_routes, model_store_routes, page)
        self._batch_handlers = {} if batch_store is None else batch_routes.batch_handlers(batch_store)

    def apply(self, spec: GatewaySpec) -> None:
        """Takes over other settings of the gateway, for all later requests."""
        self._forwarder.apply(spec)

    def route_request(self, request: Request, record: RequestRecord) -> Awaitable[Response | StreamingResponse]:
        """Answers a request, and notes its route in the record. Raises GPUMeshError only if nothing was sent yet;
        BadRequest for a path that is not served. It is no coroutine, because each coroutine costs time."""
        path = request.path
        route = MODEL_ROUTES.get(path)
        if route is not None:
            record.route = path
            if request.method not in route.methods:
                return _refuse_method(request, record, route.methods)
            return self._forwarder.forward(request, record, route)
        template = _find_template(path)
        methods = ANY_NODE_ROUTES.get(template)
        if methods is not None:
            record.route = template
            if request.method not in methods:
                return _refuse_method(request, record, methods)
            _require_unlimited_key(request)
            return self._forward_to_any_node(request, record)
        handlers = self._handlers.get(template) or self._batch_handlers.get(template)
        if handlers is None:
            record.route = OTHER_ROUTE  # the route is a label of metrics: clients must not add names to it
            other_route = find_model_route(request.method, request.target)
            if other_route is not None:
                return self._forwarder.forward(request, record, other_route)
            raise BadRequest(f"there is no {path[:200]} here", status=404)
        record.route = template
        if template not in self._batch_handlers:
            _require_unlimited_key(request)
        for methods, handler in handlers:
            if request.method in methods:
                return handler(request)
        return _refuse_method(request, record, [method for methods, _ in handlers for method in methods])

    # -- to one node ---------------------------------------------------------------------------------------------

    async def _forward_to_any_node(self, request: Request, record: RequestRecord) -> Response | StreamingResponse:
        """Forwards the request to any node; a question about one model goes to any node that has the model."""
        path, key = request.path, request.key
        node = read_node(request.headers, self._mesh.topology)
        allowed_nodes = None
        if key is not None:
            key.require_node(node)
            allowed_nodes = key.nodes
        demand = Demand(None, OLLAMA_ONLY, node, needs_slot=False, nodes=allowed_nodes)
        if path.startswith(OPENAI_MODEL_PREFIX):
            model, rules = path.removeprefix(OPENAI_MODEL_PREFIX), self._mesh.model_rules
            if key is not None:
                key.require_model(model, rules.identity(model))
            spec = rules.find(model)
            # Servers know it by different names.
            if (spec is not None and spec.aliases) or self._mesh.fleet.is_renamed(model):
                return await self._fleet_routes.openai_model(request, model)
            demand = replace(demand, model=model, kinds=ALL_KINDS)
        record.demand = demand
        return await proxy.forward_request(
            self._mesh,
            request,
            demand,
            proxy.build_call(request, await request.read_body()),
            find_client_api(path),
            timeout_s=ANY_NODE_TIMEOUT_S,
            progress=record.progress,
            on_answer=record.note_answer,
            # HEAD has no body, and a POST is not repeated on a second node: it may change something.
            require_json=request.method == "GET",
        )


def _require_unlimited_key(request: Request) -> None:
    """Raises BadRequest if the request may change the mesh or a node, and its key is limited to a part of them."""
    if request.key is not None and request.method not in ("GET", "HEAD", "OPTIONS"):
        request.key.require_all()


def _find_template(path: str) -> str:
    """The template under which the tables here list the path: for most paths the path itself."""
    for prefix, template in _TEMPLATE_BY_PREFIX.items():
        if path.startswith(prefix):
            return template
    return path


async def _refuse_method(request: Request, record: RequestRecord, methods: Iterable[str]) -> Response:
    """Answers 405, but 204 to a preflight of an allowed origin. A preflight comes here because no route has the method
    OPTIONS; its CORS headers are added as to every answer to that origin."""
    allow_header = (("Allow", ", ".join(sorted(methods))),)
    if request.method == "OPTIONS" and request.cors is not None:
        return Response(status=204, headers=allow_header)
    record.outcome = RequestOutcome.REFUSED
    return error_reply(record.path, BadRequest("method not allowed", status=405), headers=allow_header)


def _handler_table(fleet: FleetRoutes, stores: ModelStoreRoutes, page: UiPage) -> dict[str, HandlersByMethod]:
    """The handlers of all routes that are not forwarded, by the path's template."""
    return {
        "/": ((_GET, fleet.root),),
        "/healthz": ((_GET, fleet.healthz),),
        "/metrics": ((_GET, fleet.metrics),),
        "/mesh/status": ((_GET, fleet.status),),
        "/mesh/usage": ((_GET, fleet.usage),),
        "/mesh/events": ((_GET, page.events),),
        "/mesh/history": ((_GET, page.history),),
        "/mesh/log": ((_GET, page.log),),
        "/mesh/requests": ((_GET, page.requests),),
        "/mesh/requests/{number}/cancel": ((_POST, page.cancel_request),),
        "/mesh/nodes/{node}/{action}": ((_POST, page.change_node),),
        UI_PATH: ((_GET, page.html),),
        "/api/version": ((_GET, fleet.version),),
        "/api/tags": ((_GET, fleet.tags),),
        "/api/ps": ((_GET, fleet.ps),),
        "/v1/models": ((_GET, fleet.openai_models),),
        "/api/pull": ((_POST, stores.pull),),
        "/api/push": ((_POST, stores.push),),
        "/api/create": ((_POST, stores.create),),
        "/api/copy": ((_POST, stores.copy),),
        "/api/delete": ((_DELETE, stores.delete),),
        "/api/blobs/{digest}": ((_HEAD, stores.has_blob), (_POST, stores.add_blob)),
    }
