from __future__ import annotations

import pytest

from gpumesh.config.mesh_file import yaml_tree
from gpumesh.config.mesh_file.variable_expansion import MAX_EXPANDED, UNUSABLE, expand_tree, expand_variables

ENV = {"HOST": "iceland", "EMPTY": "", "LONG": "x" * MAX_EXPANDED, "POD_API_KEY": "hunter2", "BYTES": "caf\udce9"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no variable", "no variable"),
        ("${HOST}", "iceland"),
        ("a-${HOST}-${HOST}.lan", "a-iceland-iceland.lan"),
        ("${NOPE:-here}", "here"),
        ("${EMPTY:-here}", "here"),
        ("${NOPE:-}", ""),
        ("${EMPTY}", ""),
        ("$${HOST}", "${HOST}"),
        ("$HOST", "$HOST"),
        ("$", "$"),
    ],
)
def test_variables(text: str, value: str) -> None:
    assert expand_variables(text, ENV) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("${NOPE}", "the variable NOPE is not set"),
        ("${BYTES}", "the value of the variable BYTES is not UTF-8"),
        ("${HOST", r"write \$\{VAR\}"),
        ("${}", r"write \$\{VAR\}"),
        ("${a b}", r"write \$\{VAR\}"),
        ("${POD_API_KEY}", "holds a secret by its name"),
        ("${LONG}${LONG}", f"expands to more than {MAX_EXPANDED}"),
    ],
)
def test_what_cannot_be_expanded(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        expand_variables(text, ENV)
    assert "hunter2" not in str(caught.value)


def test_a_tree_with_its_faults_in_their_places() -> None:
    tree, faults = yaml_tree.parse_yaml("a: ['${HOST}', '${NOPE}', ~]\nb: {c: '${POD_API_KEY}', d: 5}\n")
    assert tree is not None
    assert faults == []
    value, faults = expand_tree(tree, ENV)
    assert value == {"a": ["iceland", UNUSABLE, None], "b": {"c": UNUSABLE, "d": "5"}}
    assert [fault.path for fault in faults] == [("a", 1), ("b", "c")]
    assert [fault.position.line for fault in faults if fault.position is not None] == [1, 2]


def test_what_was_broken_already_is_not_told_twice() -> None:
    tree, faults = yaml_tree.parse_yaml("a: *nobody\n")
    assert tree is not None
    assert len(faults) == 1
    assert expand_tree(tree, ENV) == ({"a": UNUSABLE}, [])
