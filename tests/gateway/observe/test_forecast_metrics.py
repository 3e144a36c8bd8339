from __future__ import annotations

from gpumesh.backends.base import ServerCounters
from gpumesh.gateway.observe.exposition import render
from gpumesh.gateway.observe.forecast_metrics import forecast_families
from gpumesh.mesh.nodes.forecast_record import ForecastRecord
from tests.gateway.fleet import metric
from tests.mesh.nodes.test_forecast_record import load, placement


def test_forecasts_are_counted_against_what_happened() -> None:
    record = ForecastRecord()
    load(record, 0.0, pushed_out=["llama3.1:8b"])
    made = placement(10.0)
    record.note_end(made, 13.0, ServerCounters(cached_tokens=200), is_answered=True)
    text = render(forecast_families({"iceland": record, "idle": ForecastRecord()}))

    def of(name: str, node: str = "iceland", **more: str) -> float:
        return metric(text, f"gpumesh_{name}", node=node, **more)

    assert (of("forecast_seconds_total"), of("forecast_actual_seconds_total")) == (9.0, 9.0)
    assert (of("forecast_ratio_count"), of("forecast_ratio_bucket", le="0.9")) == (2, 1)
    assert of("model_loads_total", model="qwen2.5:7b") == 1
    assert of("model_load_seconds_total") == 4.0
    assert of("models_pushed_out_total", model="llama3.1:8b") == 1
    assert (of("prompt_tokens_believed_cached_total"), of("prompt_tokens_cached_total")) == (600, 200)
    assert of("forecast_seconds_total", "idle") == 0
