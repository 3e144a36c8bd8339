"""llama-server, the HTTP server of llama.cpp: OpenAI's API, and its own routes for its state and its load.

Measured with build 10434 (``docs/internals/server-kinds.md``). While the server loads its model, the answer to every
request is 503 "Loading model". ``/props`` has the number of slots and the context of one slot. ``/slots`` says which
slots are busy; it holds prompts only if the server was started for debugging. ``/metrics`` exists only with
``--metrics``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gpumesh.backends import model_list, prometheus_text, safe_json, unusable_answers
from gpumesh.backends.base import ContinuationMethod, HttpCall, Inventory, ProbeAnswers, ServerLoad
from gpumesh.backends.openai import MOST_SLOTS, OpenAIDialect, owner_names

LOADING = "Loading model"


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
        """The inventory of any server with OpenAI's API. Raises ProbeError also if ``/props`` is not llama-server's."""
        inventory = super().read_inventory(answers)
        answer = answers.get("props")
        status, body = answer if answer is not None else (404, b"")
        unusable_answers.raise_for_status(status, body)
        props = (safe_json.parse_report(body) if status == 200 else None) or {}
        if not isinstance(props.get("default_generation_settings"), dict):
            broken = unusable_answers.broken_json_error(body, "/props") if status == 200 else None
            raise broken or unusable_answers.other_server_error(self.label, "/props", status, body)
        slots = _read_slots(answers.get("slots"))
        slot_contexts = [
            length
            for slot in slots
            if (length := safe_json.as_bounded_count(slot.get("n_ctx"), model_list.MAX_CONTEXT_TOKENS))
        ]
        loaded = inventory.loaded
        if slot_contexts:  # a request gets any of the slots, so only the smallest context is sure
            loaded = tuple(replace(model, context_length=min(slot_contexts)) for model in loaded)
        return replace(inventory, loaded=loaded, load=_read_load(slots, answers.get("metrics")))


def _read_slots(answer: tuple[int, bytes] | None) -> tuple[dict[str, object], ...]:
    """The slots; empty where the server was started with ``--no-slots``."""
    if answer is None or answer[0] != 200:
        return ()
    return safe_json.as_objects(safe_json.parse(answer[1]), MOST_SLOTS)


def _read_load(slots: Sequence[Mapping[str, object]], metrics: tuple[int, bytes] | None) -> ServerLoad:
    page = metrics[1] if metrics is not None and metrics[0] == 200 else b""
    busy_slots = sum(slot.get("is_processing") is True for slot in slots) if slots else None
    running = prometheus_text.read_request_count(page, "llamacpp:requests_processing")
    return ServerLoad(
        running=busy_slots if busy_slots is not None else running,
        waiting=prometheus_text.read_request_count(page, "llamacpp:requests_deferred"),
        # Only some builds have it; build 10434 does not.
        kv_cache_pct=prometheus_text.read_share_pct(page, "llamacpp:kv_cache_usage_ratio"),
    )
