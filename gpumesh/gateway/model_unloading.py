"""``ollama stop`` and the unload buttons of web pages: a request without a prompt that asks for no time in memory.

Ollama then generates nothing, but removes the model from its memory. A client that sends this to the gateway means the
mesh: so each node that has the model gets it. The answer is a success only if all of them have done it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec

from gpumesh.backends import safe_json
from gpumesh.balancer.base import Demand
from gpumesh.gateway.body_parsers.json_members import Members, RawValue
from gpumesh.gateway.http.responses import Response, json_response
from gpumesh.gateway.model_store_routes import node_header, render_failures
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.models.fleet_store import FleetStore, is_done_where_possible

# The member that is the prompt, for each route that unloads a model if this member is empty (server/routes.go).
PROMPT_MEMBERS: Mapping[str, str] = {"/api/generate": "prompt", "/api/chat": "messages"}
MAX_KEEP_ALIVE_BYTES = 64  # a longer duration is none that a client writes
NS_PER_S = 1e9
_EMPTY_VALUE = re.compile(rb'\s*(?:null|""|\[\s*\])\s*')  # a text of blanks is a prompt
_ZERO_DURATION = re.compile(
    r"[+-]?(?:0|(?:(?:0+\.?0*|\.0+)(?:ns|us|µs|μs|ms|s|m|h))+)"
)  # both signs for micro are Go's


def asks_to_unload(path: str, members: Members) -> bool:
    """Whether the request has no prompt, and a ``keep_alive`` of 0."""
    prompt_member = PROMPT_MEMBERS.get(path)
    keep_alive = members.known.get("keep_alive")
    if prompt_member is None or keep_alive is None or not _is_zero_duration(keep_alive):
        return False
    prompt = members.known.get(prompt_member)
    if prompt is None:
        return True
    return len(prompt) <= MAX_KEEP_ALIVE_BYTES and _EMPTY_VALUE.fullmatch(bytes(prompt)) is not None


def _is_zero_duration(value: RawValue) -> bool:
    """Whether Ollama reads this value as no time: a number of seconds that is less than a nanosecond, or a text with a
    Go duration."""
    if len(value) > MAX_KEEP_ALIVE_BYTES:
        return False
    try:
        duration = msgspec.json.decode(value)
    except ValueError:
        return False
    if isinstance(duration, str):
        return _ZERO_DURATION.fullmatch(duration) is not None
    is_number = isinstance(duration, int | float) and not isinstance(duration, bool)
    return is_number and 0 <= duration * NS_PER_S < 1


async def unload_everywhere(mesh: Mesh, demand: Demand, path: str, asked_model: str, timeout_s: float) -> Response:
    """Unloads the demand's model on all nodes that have it, or on those that the demand names, and answers as Ollama
    does. ``asked_model`` is the name that the client used. Raises NoNodeError and ModelMissing."""
    assert demand.model is not None, "an unload without a model was refused before"
    model = mesh.model_rules.name_in_mesh(demand.model)
    results = await FleetStore(mesh).unload(model, demand.node, allowed=demand.nodes, timeout_s=timeout_s)
    if not is_done_where_possible(results):
        return render_failures(results, "unloaded")
    nodes = [result.node for result in results if result.done]
    return json_response(_unloaded_document(path, asked_model), headers=node_header(nodes))


def _unloaded_document(path: str, model: str) -> bytes:
    """What Ollama answers after it has unloaded a model."""
    created_at = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    answer: dict[str, object] = {"model": model, "created_at": created_at}
    if path == "/api/chat":
        answer["message"] = {"role": "assistant", "content": ""}
    else:
        answer["response"] = ""
    return safe_json.dump_compact({**answer, "done": True, "done_reason": "unload"})
