"""`gpumesh bench simulate`: its table, its JSON, its files, and what it says about wrong options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gpumesh.cli.root_command import app
from gpumesh.errors import UsageError

FLEET = """\
nodes:
  - {name: fast, tokens_per_s: 100, slots: 4, models: [llama3.1:8b, qwen2.5:14b], vram_mib: 12000, load_s: 4}
  - {name: slow, tokens_per_s: 50, slots: 4, models: [llama3.1:8b]}
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    return path


def simulate(fleet: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "simulate", "--fleet", str(fleet), *arguments])


def test_a_table_with_a_row_per_policy(fleet: Path) -> None:
    result = simulate(fleet, "--poisson", "2", "-n", "200", "--policy", "adaptive", "--policy", "reference")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[0] == "policy"
    assert [line.split()[0] for line in lines[2:4]] == ["adaptive", "reference"]
    assert lines[4].startswith("adaptive: fast ")
    assert "\x1b" not in result.stdout


def test_the_same_seed_gives_the_same_json(fleet: Path) -> None:
    options = ("--poisson", "1", "-n", "100", "--mix", "llama3.1:8b=0.7,qwen2.5:14b=0.3", "--load", "0.8", "--json")
    first, second = simulate(fleet, *options), simulate(fleet, *options)
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout
    document = json.loads(first.stdout)
    assert len(document["policies"]) == 5
    assert all(policy["loads"] >= 2 for policy in document["policies"])


def test_conversations_of_several_clients_beside_a_batch(fleet: Path) -> None:
    options = ("--poisson", "1", "-n", "60", "--turns", "3", "--systems", "2", "--clients", "2", "--batch", "20")
    more = (
        "--priorities",
        "interactive=1,normal=2",
        "--contexts",
        "default=1,8192=1",
        "--policy",
        "adaptive",
        "--json",
    )
    document = json.loads(simulate(fleet, *options, *more).stdout)
    (policy,) = document["policies"]
    assert policy["served"] == 80
    assert set(policy["completion_by_priority"]) == {"interactive", "normal", "batch"}
    assert set(policy["completion_by_client"]) == {"client1", "client2", "batch"}
    assert policy["read_share"] < 1


def test_a_trace_and_the_files_of_a_result(fleet: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 1300, "output_length": 30, "hash_ids": [1, 2, 3]}
    trace.write_text("".join(json.dumps({**row, "timestamp": 500 * number}) + "\n" for number in range(20)))
    out = tmp_path / "out"
    options = ("--trace", str(trace), "--speed", "2", "--out", str(out))
    assert simulate(fleet, *options).exit_code == 0
    assert json.loads((out / "simulation.json").read_text())["requests"] == 20
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    again = simulate(fleet, *options)
    assert isinstance(again.exception, UsageError)
    assert simulate(fleet, *options, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --trace FILE or --poisson RATE"),
        (("--poisson", "0"), "--poisson 0 is not above 0"),
        (("--poisson", "nan"), "--poisson nan is not above 0"),
        (("--poisson", "1", "--policy", "best"), "--policy 'best' is none of"),
        (("--poisson", "1", "--mix", "mistral:7b"), "no node of the fleet has the model 'mistral:7b'"),
        (("--poisson", "1", "--priorities", "urgent=1"), "'urgent=1' cannot be read"),
        (("--poisson", "1", "--mix", "llama3.1:8b=-1"), "no value with a share above 0"),
        (("--poisson", "1", "--contexts", "0"), "'0' cannot be read"),
        (("--poisson", "1", "-n", "0"), "Invalid value for '-n'"),
        (("--poisson", "1", "--load", "0.5", "--speed", "2"), "--load and --speed both set the times"),
    ],
)
def test_wrong_options(fleet: Path, options: tuple[str, ...], message: str) -> None:
    result = simulate(fleet, *options)
    assert result.exit_code != 0
    assert message in f"{result.output} {result.exception}"


def test_all_problems_of_a_fleet_file(fleet: Path) -> None:
    fleet.write_text("nodes: [{tokens_per_s: 1, models: [m], slot: 2}, {models: [m]}]")
    result = simulate(fleet, "--poisson", "1")
    text = f"{result.output} {result.exception}"
    assert "nodes[0].slot: unknown key; did you mean slots?" in text
    assert "nodes[1].tokens_per_s: is missing" in text


def test_options_that_a_trace_makes_useless(fleet: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({"timestamp": 0, "input_length": 100, "output_length": 30, "hash_ids": [1]}) + "\n")
    options = ("--trace", str(trace), "--policy", "adaptive", "--tokens", "10")
    refused = simulate(fleet, *options, "--think-s", "5", "--turns", "3")
    assert "--turns, --think-s, --tokens: no effect with --trace" in str(refused.exception)
    assert simulate(fleet, *options, "--batch", "5").exit_code == 0  # the length of the batch requests' answers


def test_a_mesh_file_is_no_fleet_file(fleet: Path) -> None:
    fleet.write_text("nodes: [{name: iceland, ssh: {host: 192.0.2.1}}]")
    result = simulate(fleet, "--poisson", "1")
    assert "this is a mesh.yaml" in f"{result.output} {result.exception}"
    assert "tokens_per_s" not in f"{result.output} {result.exception}"


def test_clients_are_shown_in_their_order(fleet: Path) -> None:
    options = ("--poisson", "3", "-n", "300", "--clients", "11", "--policy", "adaptive")
    line = simulate(fleet, *options).stdout.splitlines()[-1]
    names = [part.split()[0] for part in line.removeprefix("adaptive: ").split("; ")]
    assert names == [f"client{number}" for number in range(1, 12)]
