"""The metrics of forecasts for Prometheus: how good they were, and which loads the gateway has caused. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gpumesh.gateway.observe.exposition import Family, Labels, counter, histogram
from gpumesh.mesh.nodes.forecast_record import RATIO_BOUNDS, ForecastRecord


def forecast_families(records: Mapping[str, ForecastRecord]) -> Iterator[Family]:
    """Yields the metrics of the forecasts. ``records``: the record of each node, by its name."""

    def counter_by_node(name: str, text: str, values: Mapping[str, float]) -> Family:
        """A counter with one sample for each node."""
        return counter(name, text, ((_node_labels(node), value) for node, value in values.items()))

    yield counter_by_node(
        "gpumesh_forecast_seconds_total",
        "Times that answered requests were forecast to take on their node, without the queue of the gateway.",
        {node: record.forecast_s for node, record in records.items()},
    )
    yield counter_by_node(
        "gpumesh_forecast_actual_seconds_total",
        "Times that the same requests have taken there: against the forecast, the bias of the forecasts.",
        {node: record.actual_s for node, record in records.items()},
    )
    yield histogram(
        "gpumesh_forecast_ratio",
        "Actual time of an answered request, divided by its forecast.",
        RATIO_BOUNDS,
        {_node_labels(node): record.ratios for node, record in records.items()},
    )
    yield counter(
        "gpumesh_model_loads_total",
        "Loads of a model that requests of this gateway have caused.",
        _counts_by_model({node: record.loads for node, record in records.items()}),
    )
    yield counter_by_node(
        "gpumesh_model_load_seconds_total",
        "Time that these loads have taken.",
        {node: record.load_s for node, record in records.items()},
    )
    yield counter(
        "gpumesh_models_pushed_out_total",
        "Models that had to leave the memory for these loads.",
        _counts_by_model({node: record.pushed_out for node, record in records.items()}),
    )
    yield counter_by_node(
        "gpumesh_prompt_tokens_believed_cached_total",
        "Tokens of answered prompts that were believed to be in the server's cache, by the forecasts.",
        {node: record.cached_tokens for node, record in records.items()},
    )
    yield counter_by_node(
        "gpumesh_prompt_tokens_cached_total",
        "Tokens of answered prompts that were in the server's cache, by the servers that tell.",
        {node: float(record.reported_cached_tokens) for node, record in records.items()},
    )


def _node_labels(node: str) -> Labels:
    return (("node", node),)


def _counts_by_model(counts: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[Labels, float]]:
    """Yields labels and count for each node and model. ``counts``: by node, then by model."""
    for node, by_model in counts.items():
        for model, count in by_model.items():
            yield (("node", node), ("model", model)), float(count)
