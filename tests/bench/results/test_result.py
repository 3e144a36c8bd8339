"""A result as JSON and back, and the validation of what is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.bench.result_folder import read_result
from gpumesh.bench.results.result import result_from_json, result_json
from gpumesh.bench.workload.settings import Scenario
from gpumesh.errors import UsageError
from tests.bench.example_results import failed_record, full_result, make_stage_run, record, result, summarize_only


def test_a_result_of_an_older_version_with_fewer_keys_is_read() -> None:
    """Adding keys is compatible."""
    document = result_json(full_result())
    for stage_json in document["stages"]:
        del stage_json["rates"]["loaded_tokens_per_s"]
    document["something new"] = 1
    assert result_from_json(document).stages[0].rates.loaded_tokens_per_s is None


def test_values_of_the_wrong_type_are_refused(tmp_path: Path) -> None:
    document = result_json(full_result())
    for key, value in (("stages", 5), ("at", "yesterday"), ("scenario", "dance"), ("settings", None)):
        with pytest.raises(ValueError, match=r"."):
            result_from_json({**document, key: value})
    with pytest.raises(UsageError, match="cannot read"):
        read_result(tmp_path / "nowhere")


def test_failed_counts_all_stages() -> None:
    made = result(
        summarize_only(make_stage_run(record(), failed_record(1))),
        summarize_only(make_stage_run(failed_record(0), failed_record(1))),
    )
    assert made.failed == 3
    assert not made.simulated
    assert replace(full_result(), scenario=Scenario.SWEEP).simulated
