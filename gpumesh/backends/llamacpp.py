"""llama-server, the HTTP server of llama.cpp: OpenAI's API, and routes of its own that say how it is and how busy.

Measured with build 10434 (``docs/internals/server-kinds.md``): while the model is read every request is answered with
503 "Loading model"; ``/props`` has the number of slots and the context of each; ``/slots`` says which of them work, and
no prompt unless the server was started for debugging; ``/metrics`` is there with ``--metrics`` only.
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
        """By the owner of its models, or by what it says while it reads one."""
        if status == 503:
            error = (safe_json.parse_report(body) or {}).get("error")
            return isinstance(error, dict) and error.get("message") == LOADING
        return status == 200 and "llamacpp" in owner_names(body)

    def read_inventory(self, answers: ProbeAnswers) -> Inventory:
        """As of any server with OpenAI's API; besides, ``/props`` must be llama-server's own."""
        inventory = super().read_inventory(answers)
        answer = answers.get("props")
        status, body = answer if answer is not None else (404, b"")
        unusable_answers.raise_for_status(status, body)
        props = (safe_json.parse_report(body) if status == 200 else None) or {}
        if not isinstance(props.get("default_generation_settings"), dict):
            half = unusable_answers.broken_json_error(body, "/props") if status == 200 else None
            raise half or unusable_answers.other_server_error(self.label, "/props", status, body)
        slots = _slots(answers.get("slots"))
        contexts = [
            length
            for slot in slots
            if (length := safe_json.as_bounded_count(slot.get("n_ctx"), model_list.MAX_CONTEXT_TOKENS))
        ]
        loaded = inventory.loaded
        if contexts:
            loaded = tuple(replace(model, context_length=min(contexts)) for model in loaded)
        return replace(inventory, loaded=loaded, load=_load(slots, answers.get("metrics")))


def _slots(answer: tuple[int, bytes] | None) -> tuple[dict[str, object], ...]:
    """None where the server was started with ``--no-slots``."""
    if answer is None or answer[0] != 200:
        return ()
    return safe_json.as_objects(safe_json.parse(answer[1]), MOST_SLOTS)


def _load(slots: Sequence[Mapping[str, object]], metrics: tuple[int, bytes] | None) -> ServerLoad:
    page = metrics[1] if metrics is not None and metrics[0] == 200 else b""
    working = sum(slot.get("is_processing") is True for slot in slots) if slots else None
    running = prometheus_text.read_request_count(page, "llamacpp:requests_processing")
    return ServerLoad(
        running=working if working is not None else running,
        waiting=prometheus_text.read_request_count(page, "llamacpp:requests_deferred"),
        # Builds of 2024 and before; later ones do not say it.
        kv_cache_pct=prometheus_text.read_share_pct(page, "llamacpp:kv_cache_usage_ratio"),
    )
