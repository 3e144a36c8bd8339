"""vLLM's OpenAI-compatible server: what it adds to the API is ``/health``, ``/version`` and ``/metrics``.

After the source of vLLM 0.9 to 0.11 (``docs/internals/server-kinds.md``): each entry of ``/v1/models`` is in memory, is
owned by ``vllm``, and says ``max_model_len``; ``/health`` is 503 once the engine is dead; how many requests it runs and
how many wait is on ``/metrics`` alone. How many it could run at once it does not say: that depends on their length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gpumesh.backends import prometheus_text, unusable_answers
from gpumesh.backends.base import ContinuationMethod, HttpCall, Inventory, ProbeAnswers, ServerLoad
from gpumesh.backends.openai import OpenAIDialect, owner_names

OWNER = "vllm"


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
        """By the owner of its models."""
        return status == 200 and OWNER in owner_names(body)

    def read_inventory(self, answers: ProbeAnswers) -> Inventory:
        """As of any server with OpenAI's API; besides, its models must be vLLM's."""
        inventory = super().read_inventory(answers)
        models = answers.get("models")
        if models is not None and not self.recognizes(*models):
            raise unusable_answers.other_server_error(self.label, "/v1/models", *models)
        metrics = answers.get("metrics")
        page = metrics[1] if metrics is not None and metrics[0] == 200 else b""
        load = ServerLoad(
            running=prometheus_text.read_request_count(page, "vllm:num_requests_running"),
            waiting=prometheus_text.read_request_count(page, "vllm:num_requests_waiting"),
            # The second name is that of 0.8 and before.
            kv_cache_pct=prometheus_text.read_share_pct(page, "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        )
        return replace(inventory, load=load)
