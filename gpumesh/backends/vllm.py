"""The dialect of vLLM's OpenAI-compatible server, which adds ``/health``, ``/version`` and ``/metrics`` to the API.

Read from vLLM's public source (``docs/internals/server-kinds.md``). Each entry of ``/v1/models`` is in memory, is owned
by ``vllm``, and has ``max_model_len``. ``/health`` is 503 once the engine is dead. Only ``/metrics`` has the numbers of
running and of waiting requests. No route says how many requests could run at once: that depends on their length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gpumesh.backends import prometheus_text, unusable_answers
from gpumesh.backends.base import (
    ContinuationMethod,
    HttpCall,
    Inventory,
    ProbeAnswers,
    ServerLoad,
    successful_body,
)
from gpumesh.backends.openai import OpenAIDialect, owner_names

OWNER = "vllm"  # the ``owned_by`` of all models that vLLM lists


class VllmDialect(OpenAIDialect):
    """Implements ``base.Dialect``."""

    label = "vLLM"
    continuation = ContinuationMethod.MARKED
    latency_probe = "health"
    is_generic = False
    usual_port: int | None = 8000

    def missing_model_hint(self, models: Sequence[str]) -> str:
        names = ", ".join(models)
        return f"start the server with this model, or give it this name (`--served-model-name`): {names}"

    def probe_calls(self) -> Mapping[str, HttpCall]:
        return {
            "models": HttpCall("GET", "/v1/models"),
            "health": HttpCall("GET", "/health"),
            "version": HttpCall("GET", "/version"),
            "metrics": HttpCall("GET", "/metrics"),
        }

    def recognizes(self, status: int, body: bytes) -> bool:
        """Recognizes the owner of the models."""
        return status == 200 and OWNER in owner_names(body)

    def read_inventory(self, answers: ProbeAnswers) -> Inventory:
        """The inventory as of any server with OpenAI's API, and the load from ``/metrics``. Raises ProbeError also if
        the models are not owned by vLLM."""
        inventory = super().read_inventory(answers)
        models = answers.get("models")  # the status and the body; never None here, because ``super`` needs them
        if models is not None and not self.recognizes(*models):
            raise unusable_answers.other_server_error(self.label, "/v1/models", *models)
        page = successful_body(answers.get("metrics"))
        load = ServerLoad(
            running=prometheus_text.read_request_count(page, "vllm:num_requests_running"),
            waiting=prometheus_text.read_request_count(page, "vllm:num_requests_waiting"),
            # The second name is the older one; some versions have both.
            kv_cache_pct=prometheus_text.read_share_pct(page, "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        )
        return replace(inventory, load=load)
