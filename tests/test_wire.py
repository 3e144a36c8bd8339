"""Snapshots to JSON and back: what is read is what was written, and anything else is a ValueError."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.state import STATUS_SCHEMA, GpuState, Health, MeshState, NodeState
from gpumesh.topology import SshSpec, Target, Topology
from gpumesh.wire import from_json, status_from_json, status_json, to_json

# JSON carries milliseconds.
st.register_type_strategy(
    datetime,
    st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2200, 1, 1)).map(  # noqa: DTZ001 - made UTC below
        lambda moment: moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=UTC)
    ),
)
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
st.register_type_strategy(Path, st.sampled_from([Path("a"), Path("/b/c"), Path("~/.ssh/known_hosts")]))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(to_json(value)))


@settings(max_examples=60)
@given(st.from_type(MeshState))
def test_a_status_survives_to_json_and_back(state: MeshState) -> None:
    document = json.loads(json.dumps(status_json(state)))
    assert document["schema"] == STATUS_SCHEMA
    assert status_from_json(document) == state


@settings(max_examples=30)
@given(st.from_type(NodeState), st.from_type(SshSpec), st.from_type(Target))
def test_values_survive_to_json_and_back(node: NodeState, ssh: SshSpec, target: Target) -> None:
    assert from_json(NodeState, through_json(node)) == node
    assert from_json(SshSpec, through_json(ssh)) == ssh
    assert from_json(Target, through_json(target)) == target


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    number: int = 0


@dataclass(frozen=True)
class Sample:
    name: str
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (0, "")
    maybe: int | None = None
    either: bool | str | None = None
    colour: Colour = Colour.RED
    rate: float = 0.0
    at: datetime | None = None
    where: Path | None = None
    yes: bool = False


def test_every_form_of_a_field() -> None:
    moment = datetime(2026, 11, 24, 5, 10, 0, 123456, timezone(timedelta(hours=1)))
    sample = Sample("x", Inner(3), (Inner(1), Inner(2)), (5, "y"), 7, "text", Colour.RED, 1.5, moment, Path("/a"), True)
    document = to_json(sample)
    assert document == {
        "name": "x",
        "inner": {"number": 3},
        "many": [{"number": 1}, {"number": 2}],
        "pair": [5, "y"],
        "maybe": 7,
        "either": "text",
        "colour": "red",
        "rate": 1.5,
        "at": "2026-11-24T04:10:00.123Z",
        "where": "/a",
        "yes": True,
    }
    read = from_json(Sample, document)
    assert read.at == datetime(2026, 11, 24, 4, 10, 0, 123000, UTC), "to the millisecond, in UTC"
    assert (read.inner, read.many, read.pair, read.either, read.where) == (
        sample.inner,
        sample.many,
        sample.pair,
        "text",
        Path("/a"),
    )


class Struct(msgspec.Struct, frozen=True):
    number: int
    inner: Inner | None = None


def test_a_struct_is_a_record_too() -> None:
    assert to_json((Struct(1), Struct(2, Inner(3)))) == [
        {"number": 1, "inner": None},
        {"number": 2, "inner": {"number": 3}},
    ]
    assert from_json(Struct, {"number": 2, "inner": {"number": 3}, "newer": 1}) == Struct(2, Inner(3))
    assert from_json(Struct, {"number": 2}) == Struct(2)
    for wrong in ({}, {"number": "2"}, {"number": 2, "inner": 3}, 5):
        with pytest.raises(ValueError, match=r"expected|missing|required"):
            from_json(Struct, wrong)


def test_an_integer_is_accepted_for_a_float() -> None:
    read = from_json(Sample, {"name": "x", "rate": 5})
    assert read.rate == 5.0
    assert isinstance(read.rate, float)
    assert from_json(Sample, {"name": "x", "either": True}).either is True


def test_a_time_without_a_zone_is_utc() -> None:
    assert from_json(Sample, {"name": "x", "at": "2026-11-24T04:10:00"}).at == datetime(2026, 11, 24, 4, 10, tzinfo=UTC)


def test_unknown_keys_are_passed_over_and_defaults_hold() -> None:
    """An older client reads a newer mesh, and the other way round."""
    assert from_json(Sample, {"name": "x", "new": {"a": [1]}}) == Sample("x")


@pytest.mark.parametrize(
    "document",
    [
        None,
        5,
        "x",
        [],
        {},
        {"name": None},
        {"name": 5},
        {"name": "x", "inner": 5},
        {"name": "x", "inner": None},
        {"name": "x", "many": "ab"},
        {"name": "x", "many": {"0": {}}},
        {"name": "x", "many": [5]},
        {"name": "x", "pair": [1]},
        {"name": "x", "pair": [1, "a", 2]},
        {"name": "x", "maybe": "5"},
        {"name": "x", "maybe": True},
        {"name": "x", "maybe": 1.5},
        {"name": "x", "colour": "blue"},
        {"name": "x", "colour": []},
        {"name": "x", "rate": "1"},
        {"name": "x", "rate": True},
        {"name": "x", "rate": 10**400},
        {"name": "x", "yes": 1},
        {"name": "x", "yes": None},
        {"name": "x", "at": "yesterday"},
        {"name": "x", "at": 5},
        {"name": "x", "where": 5},
    ],
)
def test_a_value_of_the_wrong_type_is_a_value_error(document: Any) -> None:
    with pytest.raises(ValueError):
        from_json(Sample, document)


@given(JSON)
def test_any_document_is_read_or_a_value_error(document: Any) -> None:
    for kind in (Sample, MeshState, Topology, GpuState):
        try:
            from_json(kind, document)
        except ValueError:
            continue


@settings(max_examples=60)
@given(st.from_type(NodeState), st.data())
def test_a_status_spoilt_anywhere_is_read_or_a_value_error(node: NodeState, data: st.DataObject) -> None:
    document = through_json(node)
    part: Any = document
    while isinstance(part, dict) and part:
        key = data.draw(st.sampled_from(sorted(part)))
        if not isinstance(part[key], dict) or data.draw(st.booleans()):
            part[key] = data.draw(JSON)
            break
        part = part[key]
    try:
        from_json(NodeState, document)
    except ValueError:
        return


@pytest.mark.parametrize("document", [{}, {"schema": "gpumesh.status/2"}, {"schema": None}])
def test_another_schema_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=STATUS_SCHEMA):
        status_from_json(document)


def test_enums_and_mappings_as_json_has_them() -> None:
    assert to_json({Health.DOWN: [Health.HEALTHY, (1, None)]}) == {"down": ["healthy", [1, None]]}
