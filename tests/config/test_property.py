"""Any text gives a Topology or a ConfigError: never a traceback, and nothing that a terminal would obey."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh import config
from gpumesh.config import value_parsers
from gpumesh.config.mesh_file.error_messages import keys_at
from gpumesh.config.redis_url import parse_redis_url
from gpumesh.errors import ConfigError
from gpumesh.topology import Topology
from tests.config.build import HOME

KEYS = sorted(
    {
        key
        for path in ((), ("gateway",), ("nodes", 0), ("nodes", 0, "ssh"), ("nodes", 0, "backend"))
        for key in keys_at(path)
    }
    | {"expect", "models", "gpus", "command", "<<", "password", "x", ""}
)
WORDS = [
    "",
    "~",
    "a",
    "22",
    "99999",
    "-1",
    "yes",
    "5s",
    "http://h:1",
    "::1",
    "${A}",
    "${B}",
    "$${",
    "[::1]:1",
    "\x1b[31m",
]
SCALARS = st.one_of(st.sampled_from(WORDS), st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
SSH = st.dictionaries(st.sampled_from(keys_at(("nodes", 0, "ssh"))), VALUES, max_size=4)
BACKEND = st.dictionaries(st.sampled_from(keys_at(("nodes", 0, "backend"))), VALUES, max_size=3)
NODE = st.fixed_dictionaries(
    {"name": st.sampled_from("abc") | VALUES},
    optional={
        "ssh": SSH | VALUES,
        "backend": BACKEND | VALUES,
        "expect": VALUES,
        "address_from": VALUES,
        "labels": VALUES,
    },
)
MESHES = st.fixed_dictionaries(
    {"nodes": st.lists(NODE, max_size=3) | VALUES},
    optional={"gateway": VALUES, "defaults": NODE | VALUES, "redis": VALUES, "version": VALUES, "name": VALUES},
)


def read(text: str) -> Topology | None:
    try:
        return config.parse(text, file="mesh.yaml", env={"A": "x\x1b", "B": "\n"}, home=HOME)
    except ConfigError as error:
        assert error.problems
        for problem in error.problems:
            assert str(problem).isprintable(), repr(str(problem))
            assert problem.line is None or problem.line >= 1
        return None


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    read(text)


@given(st.text(alphabet="a:-[]{}&*!|>'\"%@#?<, \n\t0~$", max_size=80))
def test_what_looks_like_yaml(text: str) -> None:
    read(text)


@given(VALUES)
def test_any_document(value: Any) -> None:
    read(yaml.safe_dump(value, allow_unicode=True))


@settings(max_examples=300)
@given(MESHES)
def test_what_looks_like_a_mesh(value: Any) -> None:
    mesh = read(yaml.safe_dump(value))
    if mesh is not None:
        again = read(config.dump_effective(mesh))
        assert again is not None
        assert again == mesh


@given(st.data())
def test_a_good_file_cut_or_changed_anywhere(data: st.DataObject) -> None:
    good = (
        "version: 1\nname: home\ngateway: {listen: 127.0.0.1:11430}\ndefaults:\n  ssh: {user: root}\nnodes:\n"
        "  - name: iceland\n    ssh: {host: 209.170.80.132, port: 13323}\n    backend: {port: 80}\n"
    )
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, len(good)))
    read(good[:start] + data.draw(st.text(max_size=3)) + good[end:])


@given(st.integers(1, 10**9).map(lambda microseconds: microseconds / 1e6) | st.floats(0.001, 86400))
def test_durations_are_written_as_they_are_read(seconds: float) -> None:
    assert abs(value_parsers.parse_duration(value_parsers.format_duration(seconds)) - seconds) < 1e-6


@given(st.text(max_size=40))
def test_every_form_gives_a_value_or_a_sentence(text: str) -> None:
    for form in (
        value_parsers.parse_host,
        value_parsers.parse_user,
        value_parsers.parse_jump,
        value_parsers.parse_alias,
        value_parsers.parse_path,
        value_parsers.parse_command,
        value_parsers.parse_url,
        parse_redis_url,
    ):
        try:
            form(text)
        except ValueError as error:
            assert str(error)
            assert str(error)[0].islower()
