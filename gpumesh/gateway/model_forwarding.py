"""``ModelForwarder`` sends a request to a node that has its model, by the rules of mesh.yaml for models and keys.

Without such rules the node gets the body as the client sent it. With them, the body may get another name of the model,
and another context.
"""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial

import msgspec
from msgspec.structs import replace

from gpumesh.backends.body_pieces import COPY_BYTES, join_pieces
from gpumesh.backends.model_member import replace_in_query
from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.prefixes.prints import FIRST_BLOCK_BYTES
from gpumesh.errors import GPUMeshError, NoNodeError, ServersFailed
from gpumesh.gateway import proxy
from gpumesh.gateway.access.client_names import ClientNames
from gpumesh.gateway.access.quotas import KeyQuotas
from gpumesh.gateway.body_parsers.form_data import Form, read_boundary, scan_form
from gpumesh.gateway.body_parsers.json_members import (
    SMALL_BODY_BYTES,
    Members,
    read_members,
    read_small_members,
    rewrite_body,
)
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.heartbeat import Heartbeats
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.gateway.late_replies import end_with_error, end_with_response, life_sign
from gpumesh.gateway.model_requests import (
    ClientApi,
    ModelRoute,
    only_uses_model,
    read_demand,
    read_model,
    read_node,
    read_options,
    read_timeout,
)
from gpumesh.gateway.model_unloading import asks_to_unload, unload_everywhere
from gpumesh.gateway.observe.record import RequestRecord
from gpumesh.gateway.prompt_reading import PromptReader
from gpumesh.gateway.query_model import looks_like_json, may_be_raw, read_query_model
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.requests.answer import Answer
from gpumesh.text.model_names import full_name
from gpumesh.topology import GatewaySpec

# After an answer with one of these statuses, the fallback of the model is tried: the servers with the model could not
# be reached, or could not take the request. Not 500, because the request itself may make servers fail.
FALLBACK_STATUSES = (502, 503)
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


class _ClientBody(msgspec.Struct, frozen=True, gc=False):
    """The body of a request as the client has sent it. ``model`` is the model's name in it; ``None`` if it names
    none. ``form`` is ``None`` for JSON; a form has no ``members``. ``in_query``: it is neither, and the model is named
    in the query."""

    data: bytes
    members: Members
    model: str | None
    form: Form | None = None
    in_query: bool = False


class ModelForwarder:
    """Forwards requests to the routes of ``MODEL_ROUTES``."""

    def __init__(self, mesh: Mesh, client_names: ClientNames, quotas: KeyQuotas) -> None:
        self._mesh = mesh
        self._rules = mesh.model_rules
        self._client_names = client_names
        self._quotas = quotas
        self._prompts = PromptReader(mesh.prompt_hasher)
        self.apply(mesh.topology.gateway)

    def apply(self, spec: GatewaySpec) -> None:
        """Takes over other settings of the gateway, for all later requests."""
        self._spec = spec
        self._heartbeats = Heartbeats(min((value for value in spec.heartbeat_s.values() if value), default=1.0))

    def forward(
        self, request: Request, record: RequestRecord, route: ModelRoute
    ) -> Awaitable[Response | StreamingResponse]:
        """Forwards the request to a node that has its model. If no node can serve the model, tries its fallbacks. A
        stream that is silent for too long gets a heartbeat. Raises GPUMeshError before the first byte to the client,
        and BadRequest if the client's key forbids the request.

        Most bodies are short JSON that has come as a whole. For these, no coroutine is made here: each costs time."""
        data = request.take_body()
        if data is not None and route.prompt_members:  # a route with prompt members takes no forms
            try:
                members = read_small_members(data)
            except BadRequest:
                members = None  # ``_forward_body`` finds out what to do with it
            if members is not None:
                record.body_bytes = len(data)
                return self._forward_members(request, record, route, data, members)
        return self._forward_body(request, record, route, data)

    async def _forward_body(
        self, request: Request, record: RequestRecord, route: ModelRoute, data: bytes | None
    ) -> Response | StreamingResponse:
        """Does the work of ``forward`` for any body. ``data`` is ``None`` if the body has not come as a whole yet, or
        is compressed."""
        if data is None:
            data = await request.read_body()
        record.body_bytes = len(data)
        boundary = None if route.prompt_members else read_boundary(request.headers)
        if boundary is not None:
            form = await request.run_sliced(scan_form(data, boundary))
            return await self._forward_form(request, record, route, form)
        try:
            members = await read_members(data, request)
        except BadRequest:
            query_model = read_query_model(request.target)
            if request.method == "GET" or may_be_raw(route, request.path, request.headers, query_model):
                return await self._forward_raw(request, record, route, data, query_model)
            if not route.is_known:
                raise _no_route_error(request.path) from None
            raise
        forwarding = self._forward_members(request, record, route, data, members)
        del data, members  # a body that is rewritten need not stay in memory
        return await forwarding

    def _forward_members(
        self, request: Request, record: RequestRecord, route: ModelRoute, data: bytes, members: Members
    ) -> Awaitable[Response | StreamingResponse]:
        """Does the work of ``forward`` for a JSON body with these members."""
        model = read_model(route, members)
        if model is None and not route.is_known and (query_model := read_query_model(request.target)) is not None:
            return self._forward_raw(request, record, route, data, query_model)
        demand = self._read_demand(request, route, members, model, size=len(data))
        if "keep_alive" in members.known and asks_to_unload(request.path, members):
            record.demand = demand
            timeout_s = read_timeout(request.headers, self._spec.timeout_s)
            return unload_everywhere(self._mesh, demand, request.path, model or str(demand.model), timeout_s)
        interval_s = 0.0 if demand.is_whole_text else self._spec.heartbeat_s.get(request.path, 0.0)
        needs_work = (  # whether ``_forward_json`` has anything to do, case by case
            # A shorter prompt has no block.
            (len(data) >= FIRST_BLOCK_BYTES and route.prompt_members)
            or demand.session is not None
            or self._rules.specs
            or model is None
            or not members.has_common_spelling
        )
        forwarding: Awaitable[Response | StreamingResponse]
        if needs_work:
            forwarding = self._forward_json(request, record, route, _ClientBody(data, members, model), demand)
        else:
            timeout_s = read_timeout(request.headers, self._spec.timeout_s)
            forwarding = self._send(request, record, route, demand, data, timeout_s)
        return self._keep_alive(request, record, route.api, forwarding, interval_s) if interval_s else forwarding

    async def _keep_alive(
        self,
        request: Request,
        record: RequestRecord,
        api: ClientApi,
        forwarding: Awaitable[Response | StreamingResponse],
        interval_s: float,
    ) -> Response | StreamingResponse:
        """Waits for the reply of ``forwarding``. After ``interval_s`` seconds of silence the stream of the
        answer begins; from then on, a failure becomes its last frame."""
        request.heartbeat = heartbeat = self._heartbeats.start(request, interval_s, life_sign(api))
        try:
            reply = await forwarding
        except GPUMeshError as error:
            if request.stream is None:
                raise
            return end_with_error(request, request.stream, record, api, error)
        finally:
            heartbeat.stop()
            request.heartbeat = None  # a cycle: only the garbage collector could free the request
        if isinstance(reply, Response) and request.stream is not None:
            return end_with_response(request, request.stream, record, api, reply)
        return reply

    async def _forward_json(
        self, request: Request, record: RequestRecord, route: ModelRoute, body: _ClientBody, demand: Demand
    ) -> Response | StreamingResponse:
        """Does the work of ``forward`` for a JSON body. ``demand`` has no prompt yet."""
        data, members = body.data, body.members
        if route.prompt_members and len(data) >= FIRST_BLOCK_BYTES:  # a shorter prompt has no block
            demand = await self._add_prompt(request, route, members, demand, len(data))
        elif demand.session is not None:
            demand = replace(demand, session=self._prompts.read_session(request.headers, members))
        if self._rules.specs:
            return await self._forward_by_rules(request, record, route, body, demand)
        if body.model is None or not members.has_common_spelling:
            data = await self._render_body(request, body, demand)
        del body, members  # a body that is rewritten need not stay in memory
        timeout_s = read_timeout(request.headers, self._spec.timeout_s)
        return await self._send(request, record, route, demand, data, timeout_s)

    async def _forward_form(
        self, request: Request, record: RequestRecord, route: ModelRoute, form: Form
    ) -> Response | StreamingResponse:
        """Does the work of ``forward`` for a form, in which a recording or a picture is sent."""
        no_members = Members(())
        demand = self._read_demand(request, route, no_members, form.model, size=0)  # its size is not that of a prompt
        if demand.session is not None:
            demand = replace(demand, session=self._prompts.read_session(request.headers, no_members))
        body = _ClientBody(form.body, no_members, form.model, form)
        return await self._forward_by_rules(request, record, route, body, demand)

    async def _forward_raw(
        self, request: Request, record: RequestRecord, route: ModelRoute, data: bytes, model: str | None
    ) -> Response | StreamingResponse:
        """Does the work of ``forward`` for a body that is sent on as it is. ``model``: the model that the query
        names."""
        if request.key is not None and data and (not route.is_known or looks_like_json(data)):
            request.key.require_readable_body()
        no_members = Members(())
        demand = self._read_demand(request, route, no_members, model, size=0)
        body = _ClientBody(data, no_members, model, in_query=True)
        return await self._forward_by_rules(request, record, route, body, demand)

    async def _add_prompt(
        self, request: Request, route: ModelRoute, members: Members, demand: Demand, size: int
    ) -> Demand:
        """The demand with the hashed blocks of its prompt, by which the balancer finds the node that has the prompt's
        beginning in its cache, and with the name of its conversation. ``size``: of the body, in bytes."""
        if size <= SMALL_BODY_BYTES:
            prompt = self._prompts.read_prompt(route, members, None)
        else:
            prompt = await request.run_sliced(self._prompts.scan_prompt(route, members, None))
        return replace(demand, prompt=prompt, session=self._prompts.read_session(request.headers, members))

    async def _forward_by_rules(
        self, request: Request, record: RequestRecord, route: ModelRoute, body: _ClientBody, client_demand: Demand
    ) -> Response | StreamingResponse:
        """Does the work of ``forward`` for a mesh with rules for models. ``client_demand`` is what the client asks for,
        before any rule."""
        demands = [demand for demand in self._rules.plan_models(client_demand) if self._may_use(request, demand)]
        deadline = record.clock() + read_timeout(request.headers, self._spec.timeout_s)
        first_failure: Response | NoNodeError | None = None
        reserves_copy = False  # whether memory was reserved for a rewritten body
        for demand in demands:
            data = await self._render_body(request, body, demand)
            if data is not body.data and len(body.data) > COPY_BYTES and not reserves_copy:
                request.reserve_memory(len(body.data))  # the client's body stays in memory beside the new one
                reserves_copy = True
            timeout_s = max(deadline - record.clock(), 0.0)
            failure: Response | NoNodeError
            try:
                reply = await self._send(
                    request, record, route, demand, data, timeout_s, asked_model=body.model, in_query=body.in_query
                )
            except ServersFailed:  # the servers of a fallback could fail at the request as well
                raise
            except NoNodeError as error:  # also ModelMissing
                failure = error
            else:
                # A stream has been sent already, so only a whole reply can be replaced.
                if not isinstance(reply, Response) or reply.status not in FALLBACK_STATUSES:
                    return reply
                failure = reply
            first_failure = first_failure or failure
        assert first_failure is not None, "the model that the client asks for is among the demands"
        if isinstance(first_failure, NoNodeError):
            raise first_failure
        return first_failure

    def _read_demand(
        self, request: Request, route: ModelRoute, members: Members, model: str | None, *, size: int
    ) -> Demand:
        """The demand of the request, before any rule for models. ``model`` is the name in the body, which has ``size``
        bytes. Raises BadRequest if the client's key forbids the request, or has used as much as it may."""
        headers, key, path = request.headers, request.key, request.path
        if not route.is_known:
            if model is None:  # without a name it may be a command to the server, which no client may give
                raise _no_route_error(path)
            if key is not None and not only_uses_model(route, path):
                key.require_known_route()
        default_priority = self._spec.route_priority.get(path, Priority.NORMAL)
        if key is not None and key.priority is not None:  # mesh.yaml's class for the key comes before that of the route
            default_priority = key.priority
        demand = read_demand(
            route,
            headers,
            members,
            size=size,
            model=model or self._spec.default_model,
            node=read_node(headers, self._mesh.topology),
            request_id=request.id,
            path=path,
            client=self._client_names.name_client(key, headers, request.client_address),
            default_priority=default_priority,
            nodes=None if key is None else key.nodes,
        )
        if key is not None and key.is_limited:
            key.require_node(demand.node)
            assert demand.model is not None, "``read_demand`` has let through a demand without a model"
            key.require_model(demand.model, self._rules.identity(demand.model))
            query_model = read_query_model(request.target)
            if query_model is not None:  # a server might prefer it to the model in the body
                key.require_model(query_model, self._rules.identity(query_model))
        if key is not None and key.has_quota:
            self._quotas.admit(request, key, demand)
        return demand

    def _may_use(self, request: Request, demand: Demand) -> bool:
        """Whether the client's key allows the demand's model."""
        key = request.key
        return key is None or demand.model is None or key.allows_model(self._rules.identity(demand.model))

    async def _render_body(self, request: Request, body: _ClientBody, demand: Demand) -> bytes:
        """The body for the nodes: the client's own, unless the demand has another model or another context, or a server
        could read the name of a member in another way than we do (``Members.has_common_spelling``)."""
        members, model = body.members, demand.model
        if body.in_query:
            return body.data
        assert model is not None, "``read_demand`` has let through a demand without a model"
        if body.form is not None:
            is_renamed = self._rules.has_other_name(body.model or "", model) or self._mesh.fleet.is_renamed(model)
            if body.model is not None and not is_renamed:
                return body.data
            return await request.run_sliced(join_pieces(body.form.render_pieces(model)))
        values: dict[str, str | bytes] = {}  # the members to replace
        if body.model is None or self._rules.has_other_name(body.model, model):
            values["model"] = model
        if self._rules.specs:
            options = self._change_options(members, demand)
            if options is not None:
                values["options"] = options
        if not values and members.has_common_spelling:
            return body.data
        return await rewrite_body(body.data, members, request, **values)

    def _change_options(self, members: Members, demand: Demand) -> bytes | None:
        """The member ``options`` with the context of the demand, as JSON; ``None`` if nothing has to change: the client
        asks for no context, or for this one."""
        raw_options, residency = members.known.get("options"), demand.residency
        if raw_options is None or residency is None:
            return None
        if residency.context is None or residency.context == read_options(raw_options).context:
            return None
        return _encode({**_decode_object(raw_options), "num_ctx": residency.context})

    def _send(
        self,
        request: Request,
        record: RequestRecord,
        route: ModelRoute,
        demand: Demand,
        body: bytes,
        timeout_s: float,
        *,
        asked_model: str | None = None,
        in_query: bool = False,
    ) -> Awaitable[Response | StreamingResponse]:
        """Sends the request with this body. ``asked_model`` is the name that the client used; ``None``: it used none,
        or mesh.yaml has no rules for models. If the demand has another name, the answer tells which. ``in_query``: the
        model is named in the query."""
        record.demand = demand
        call = proxy.build_call(request, body)
        on_answer = record.note_answer
        if asked_model is not None and demand.model is not None and full_name(asked_model) != full_name(demand.model):
            on_answer = partial(_note_model, record, demand.model)
            if in_query:
                call = replace(call, path=replace_in_query(call.path, demand.model) or call.path)
        return proxy.forward_request(
            self._mesh,
            request,
            demand,
            call,
            route.api,
            timeout_s=timeout_s,
            progress=record.progress,
            on_answer=on_answer,
            require_json=not route.needs_slot
            and route.is_known,  # facts about a model: any node that has it can give them
        )


def _no_route_error(path: str) -> BadRequest:
    """The error for a route that gpumesh does not know, and a body that does not say where to send it."""
    reason = "no route of gpumesh, and the request names no model whose node could be asked"
    return BadRequest(f"there is no {path[:200]} here: it is {reason}", status=404)


def _note_model(record: RequestRecord, model: str, answer: Answer) -> None:
    """Notes that the answer has begun, and that it comes from this model."""
    answer.model = model
    record.note_answer(answer)
