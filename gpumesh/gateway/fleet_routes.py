"""Routes about the whole fleet: health, status, metrics, version, and lists of models merged from all nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from urllib.parse import parse_qs

from gpumesh import __version__
from gpumesh.backends.base import HttpCall
from gpumesh.balancer.base import Demand
from gpumesh.errors import GPUMeshError, ModelMissing
from gpumesh.gateway import merged_lists
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response, json_response
from gpumesh.gateway.http.server import Server
from gpumesh.gateway.model_requests import OLLAMA_ONLY
from gpumesh.gateway.observe import exposition, gauges
from gpumesh.gateway.observe.forecast_metrics import forecast_families
from gpumesh.gateway.observe.metrics import RequestMetrics
from gpumesh.gateway.usage.recorder import UsageRecorder
from gpumesh.gateway.usage.report import DEFAULT_SINCE, Grouping, parse_since, report_json
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import BackendPhase
from gpumesh.text.versions import oldest_version
from gpumesh.topology import BackendKind
from gpumesh.wire import status_json

LIST_TIMEOUT_S = 3.0  # a slower node is missing from a merged list
OPENAI_LIST_PATH = "/v1/models"
MAX_LIST_BYTES = 8 << 20  # a node with a longer list is missing too: the probes do not read such a list either


class FleetRoutes:
    """The handlers, one for each route."""

    def __init__(self, mesh: Mesh, metrics: RequestMetrics, server: Server, usage: UsageRecorder) -> None:
        self._mesh = mesh
        self._metrics = metrics
        self._server = server
        self._usage = usage

    async def root(self, _request: Request) -> Response:
        """Answers with the same text as Ollama: clients ask ``/`` to learn whether a server runs."""
        return Response(b"Ollama is running", content_type="text/plain; charset=utf-8")

    async def healthz(self, _request: Request) -> Response:
        """Answers 200 while any node can serve, else 503. A load balancer asks this route to learn whether it may send
        requests to this gateway."""
        usable = self._mesh.usable_nodes()
        document = {"status": "ok" if usable else "no node can serve", "nodes_usable": len(usable)}
        return _json(document, status=200 if usable else 503)

    async def status(self, _request: Request) -> Response:
        """The state of the mesh as JSON, as `gpumesh status --json` prints it."""
        return _json(status_json(self._mesh.snapshot()))

    async def metrics(self, _request: Request) -> Response:
        """All metrics in Prometheus's text format."""
        families = [
            *gauges.mesh_families(self._mesh.snapshot(), self._mesh.attempt_outcomes),
            *gauges.server_families(
                self._server.connection_count, self._server.refused_connections, self._server.evicted_connections
            ),
            *self._metrics.families(),
            *self._usage.families(),
            *forecast_families(self._mesh.fleet.forecast_records),
            *gauges.process_families(),
        ]
        return Response(exposition.render(families).encode("utf-8", "replace"), content_type=exposition.CONTENT_TYPE)

    async def usage(self, request: Request) -> Response:
        """Who has used what (``gpumesh.usage/1``). A key with limits sees its own usage only. Raises BadRequest for an
        unknown ``by`` or ``since``."""
        key, topology = request.key, self._mesh.topology
        query = parse_qs(request.target.partition("?")[2])
        now = datetime.now(UTC)
        try:
            by = [Grouping(value) for value in query.get("by", [Grouping.KEY])]
        except ValueError:
            raise BadRequest(f"by is one of {', '.join(Grouping)}") from None
        since_text = query.get("since", [DEFAULT_SINCE])[-1]
        try:
            since = parse_since(since_text, now)
        except ValueError as error:
            raise BadRequest(f"since {error}") from None
        only_key = key.usage_name if key is not None and (key.is_limited or key.has_quota) else None
        report = await self._usage.read_report(
            by=by, since=since, keys=topology.gateway.keys, only_key=only_key, now=now
        )
        return _json(report_json(report, topology.name))

    async def version(self, _request: Request) -> Response:
        """The oldest version of Ollama on the nodes: every node that may answer has at least this version. If no such
        node is up, or none has given its version, gpumesh's own version."""
        backends = [node.backend for node in self._mesh.snapshot().nodes]
        running = [backend for backend in backends if backend.state is BackendPhase.UP and backend.kind in OLLAMA_ONLY]
        versions = [backend.version for backend in running if backend.version is not None]
        return _json({"version": oldest_version(versions) or __version__})

    async def tags(self, request: Request) -> Response:
        """The models of all nodes in Ollama's format, without times that lie in the future."""
        merged = merged_lists.MergedList(
            merged_lists.TAGS_FORMAT, latest_time=merged_lists.latest_plausible_time(datetime.now(UTC))
        )
        return await self._merge_lists(request, merged, "/api/tags", OLLAMA_ONLY, aliases=True)

    async def ps(self, request: Request) -> Response:
        """The loaded models of all nodes in Ollama's format."""
        merged = merged_lists.MergedList(merged_lists.LOADED_FORMAT)
        return await self._merge_lists(request, merged, "/api/ps", OLLAMA_ONLY)

    async def openai_models(self, request: Request) -> Response:
        """The models of all nodes in OpenAI's format."""
        merged = merged_lists.MergedList(merged_lists.OPENAI_FORMAT)
        return await self._merge_lists(request, merged, OPENAI_LIST_PATH, frozenset(BackendKind), aliases=True)

    async def openai_model(self, request: Request, model: str) -> Response:
        """The entry of one model with aliases in OpenAI's list. Raises ModelMissing if no node has it, and NoNodeError
        if a node has it that cannot be asked now."""
        merged = merged_lists.MergedList(merged_lists.OPENAI_FORMAT)
        await self._merge_lists(request, merged, OPENAI_LIST_PATH, frozenset(BackendKind), aliases=True)
        entry = merged.find(model)
        if entry is None:
            nodes = None if request.key is None else request.key.nodes
            demand = self._mesh.model_rules.apply(Demand(model, needs_slot=False, nodes=nodes))
            error = self._mesh.fleet.explain_no_node(demand)
            if not isinstance(error, ModelMissing):
                raise error
            raise ModelMissing(model, hint="no node lists it under any of its names")
        return _json(entry)

    async def _merge_lists(
        self,
        request: Request,
        merged: merged_lists.MergedList,
        path: str,
        kinds: frozenset[BackendKind],
        *,
        aliases: bool = False,
    ) -> Response:
        """Asks all nodes of these kinds for their list at ``path``, adds the lists to ``merged``, and returns it as a
        response, without the models that the client's key does not allow. ``aliases``: each model is listed under all
        its names."""
        rules, key = self._mesh.model_rules, request.key
        for body in await self._ask_nodes(path, kinds, allowed_nodes=None if key is None else key.nodes):
            for _ in merged.add_body(body):
                await asyncio.sleep(0)  # a list of thousands must not hold up the streams of other clients
        if aliases:
            merged.add_names((spec.name, *spec.aliases) for spec in rules.specs)
        if key is not None and key.models is not None:
            merged.keep(lambda name: key.allows_model(rules.identity(name)))
        return json_response(merged.render())

    async def _ask_nodes(
        self, path: str, kinds: frozenset[BackendKind], *, allowed_nodes: frozenset[str] | None
    ) -> Iterable[bytes]:
        """Returns the bodies of the nodes that answered in time, with status 200 and at most ``MAX_LIST_BYTES``.
        ``allowed_nodes``: the only nodes to ask; ``None``: all."""

        async def ask_node(node: str) -> bytes | None:
            """The body of one node; ``None`` if it gave no usable answer."""
            demand = Demand(model=None, kinds=kinds, node=node, needs_slot=False)
            calls = dict.fromkeys(BackendKind, HttpCall("GET", path))  # the same call for every kind of server
            try:
                answer = await self._mesh.send(demand, calls, timeout_s=LIST_TIMEOUT_S)
                return await answer.read_at_most(MAX_LIST_BYTES) if answer.status == 200 else None
            except GPUMeshError:
                return None  # the node is missing from the list: the list's format has no place for errors

        nodes = self._mesh.usable_nodes(kinds)
        bodies = await asyncio.gather(
            *(ask_node(node) for node in nodes if allowed_nodes is None or node in allowed_nodes)
        )
        return [body for body in bodies if body is not None]


def _json(document: object, *, status: int = 200) -> Response:
    return json_response(json.dumps(document).encode(), status=status)
