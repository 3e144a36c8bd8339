"""The dialect of llama-server, llama.cpp's HTTP server: OpenAI's API, and routes of its own for its state and load.

Measured with build 10434 (``docs/internals/server-kinds.md``). While the server loads its model, the answer to every
request is 503 "Loading model". ``/props`` has the number of slots and the context of one slot. ``/slots`` says which
slots are busy; it holds prompts only if the server was started for debugging. ``/metrics`` exists only with
``--metrics``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gpumesh.backends import model_list, prometheus_text, safe_json, unusable_answers
from gpumesh.backends.base import (
    ContinuationMethod,
    HttpCall,
    Inventory,
    ProbeAnswers,
    ServerLoad,
    successful_body,
)
from gpumesh.backends.openai import MOST_SLOTS, OpenAIDialect, owner_names, read_object

LOADING = "Loading model"  # the error message of every answer while the server loads its model


class LlamacppDialect(OpenAIDialect):
    """Implements ``base.Dialect``."""

    label = "llama-server"
    continuation = ContinuationMethod.RENDERED_PROMPT
    required_probes = frozenset({"models", "props"})
    latency_probe = "health"
    is_generic = False
    usual_port: int | None = 8080

    def missing_model_hint(self, models: Sequence[str]) -> str:
        names = ", ".join(models)
        return f"start the server with this model (`-m`), or give the one that it has this name (`--alias`): {names}"

    def probe_calls(self) -> Mapping[str, HttpCall]:
        return {
            "models": HttpCall("GET", "/v1/models"),
            "health": HttpCall("GET", "/health"),
            "props": HttpCall("GET", "/props"),
            "slots": HttpCall("GET", "/slots"),
            "metrics": HttpCall("GET", "/metrics"),
        }

    def recognizes(self, status: int, body: bytes) -> bool:
        """Recognizes the owner of the models, or the error message while the server loads a model."""
        if status == 503:
            error = (safe_json.parse_report(body) or {}).get("error")
            return isinstance(error, dict) and error.get("message") == LOADING
        return status == 200 and "llamacpp" in owner_names(body)

    def read_inventory(self, answers: ProbeAnswers) -> Inventory:
        """The inventory as of any server with OpenAI's API, with the context of the slots and the load. Raises
        ProbeError also if ``/props`` is not llama-server's."""
        inventory = super().read_inventory(answers)
        answer = answers.get("props")
        # No answer is treated as the 404 of a server that does not have this route.
        status, body = answer if answer is not None else (404, b"")
        unusable_answers.raise_for_status(status, body)
        if not isinstance(read_object(answer).get("default_generation_settings"), dict):
            broken_error = unusable_answers.broken_json_error(body, "/props") if status == 200 else None
            raise broken_error or unusable_answers.other_server_error(self.label, "/props", status, body)
        slots = _read_slots(answers.get("slots"))
        contexts = [safe_json.as_bounded_count(slot.get("n_ctx"), model_list.MAX_CONTEXT_TOKENS) for slot in slots]
        # A request may get any slot, so it can count only on the smallest context.
        smallest_context = min(filter(None, contexts), default=None)
        loaded = inventory.loaded
        if smallest_context is not None:
            loaded = tuple(replace(model, context_length=smallest_context) for model in loaded)
        return replace(inventory, loaded=loaded, load=_read_load(slots, successful_body(answers.get("metrics"))))


def _read_slots(answer: tuple[int, bytes] | None) -> tuple[dict[str, object], ...]:
    """The slots in the answer to ``/slots``; empty if the server was started with ``--no-slots``."""
    return safe_json.as_objects(safe_json.parse(successful_body(answer)), MOST_SLOTS)


def _read_load(slots: Sequence[Mapping[str, object]], page: bytes) -> ServerLoad:
    """The server's load from its slots and its ``/metrics`` page; without slots, from the page alone."""
    if slots:
        running: int | None = sum(slot.get("is_processing") is True for slot in slots)
    else:
        running = prometheus_text.read_request_count(page, "llamacpp:requests_processing")
    return ServerLoad(
        running=running,
        waiting=prometheus_text.read_request_count(page, "llamacpp:requests_deferred"),
        # Only some builds have it; build 10434 does not.
        kv_cache_pct=prometheus_text.read_share_pct(page, "llamacpp:kv_cache_usage_ratio"),
    )
