from __future__ import annotations

import time

import pytest
import yaml

from gpumesh.config.mesh_file import yaml_tree
from gpumesh.config.mesh_file.yaml_tree import ListValue, MappingValue, ScalarValue


@pytest.fixture(params=["CSafeLoader", "SafeLoader"], autouse=True)
def _each_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML comes with and without libyaml, and both must read the same."""
    if not hasattr(yaml, request.param):
        pytest.skip(f"PyYAML has no {request.param} here")
    monkeypatch.setattr(yaml_tree, "_LOADER", getattr(yaml, request.param))


def faults(text: str) -> list[str]:
    return [
        f"{fault.position.line}:{fault.position.column} {fault.message}"
        for fault in yaml_tree.parse_yaml(text)[1]
        if fault.position
    ]


def test_scalars_stay_text() -> None:
    tree, found = yaml_tree.parse_yaml("a: no\nb: 22:30\nc: 12e5\nd: 0123\ne: 2026-11-24\nf:\ng: ~\nh: '~'\n")
    assert found == []
    assert isinstance(tree, MappingValue)
    values = {key: value.text for key, (_, value) in tree.entries.items() if isinstance(value, ScalarValue)}
    expected = {"a": "no", "b": "22:30", "c": "12e5", "d": "0123", "e": "2026-11-24", "f": None, "g": None, "h": "~"}
    assert values == expected


def test_every_value_knows_its_place() -> None:
    tree, _ = yaml_tree.parse_yaml("nodes:\n  - name: a\n    ssh: {port: 22}\n")
    assert tree is not None
    steps, key, value = yaml_tree.follow_path(tree, ("nodes", 0, "ssh", "port"))
    assert (steps, key.line, key.column) == (4, 3, 11)
    assert (value.position.line, value.position.column) == (3, 17)
    steps, _, value = yaml_tree.follow_path(tree, ("nodes", 0, "ssh", "host", 3))
    assert steps == 3
    assert value.position.line == 3


def test_a_key_given_twice_is_told_with_the_place_of_the_first() -> None:
    assert faults("a: 1\nb: 2\na: 3\n") == ["3:1 this key is given twice; it stands on line 1 already"]


def test_merge_keys_fill_in_what_is_not_given() -> None:
    tree, found = yaml_tree.parse_yaml("x: &x {a: 1, b: 2}\ny: &y {b: 3, c: 4}\nz: {<<: [*x, *y], a: 5}\n")
    assert found == []
    assert isinstance(tree, MappingValue)
    merged = tree.entries["z"][1]
    assert isinstance(merged, MappingValue)
    texts = {key: value.text for key, (_, value) in merged.entries.items() if isinstance(value, ScalarValue)}
    assert texts == {"a": "5", "b": "2", "c": "4"}


def test_a_merge_of_something_else_is_told() -> None:
    assert faults("z: {<<: 5}\n") == ["1:9 << takes an alias of a mapping"]


@pytest.mark.parametrize("text", ["a:\n\t- b\n", "\ta: 1\n", "a:\n  - b\n  \t- c\n"])
def test_a_tab_as_indent_is_named(text: str) -> None:
    (told,) = faults(text)
    assert told.endswith("a tab indents this line: YAML allows only spaces there")


def test_every_tab_is_named_and_a_fault_elsewhere_too() -> None:
    told = faults("a: [\n\tb,\n\tc: d: e]\nx: 'y\n")
    assert [line.split()[0] for line in told if "tab" in line] == ["2:1", "3:1"]


def test_a_tab_in_quotes_does_no_harm() -> None:
    assert yaml_tree.parse_yaml("a: 'b\tc'\n")[1] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2\nb: 3", "this is not YAML"),
        ("a: 'x", "this is not YAML"),
        ("a: b: c", "this is not YAML: mapping values are not allowed"),
        ("a: @b", "this is not YAML"),
        ("%YAML 3.0\n---\na", "this is not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "has no meaning here"),
        ("a: !include x", "the tag '!include' has no meaning here"),
        ("a: *nowhere", "the alias *nowhere refers to nothing before it"),
        ("a: &x [*x]", "the alias *x stands inside what it refers to"),
        ("--- 1\n--- 2", "a second document begins here"),
        ("? [a]\n: b", "a key must be a word"),
        ("a: \x00", "the character U+0000 (a UTF-16 file?) may not stand in YAML"),
        ("a: \ud800", "the character U+D800 may not stand in YAML"),
        ('a: "\\e[31m"', "the character U+001B has no place in a setting"),
        ("a: " + "[" * 200, "nest"),
        ("[" * 100_000, "nest"),
    ],
)
def test_faults(text: str, said: str) -> None:
    assert said in " ".join(faults(text))


def test_aliases_are_bounded_by_what_they_expand_to() -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    begun = time.perf_counter()
    (told,) = faults("\n".join(lines))
    assert "the file grows to more than 20000 values here" in told
    assert time.perf_counter() - begun < 10


def test_the_same_through_merges() -> None:
    lines = ["a0: &a0 {x: [1,2,3,4,5,6,7,8,9]}"]
    lines += [f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}, <<: *a{n - 1}}}" for n in range(1, 30)]
    assert "the file grows to more than 20000 values" in faults("\n".join(lines))[-1]


def test_a_file_that_is_too_large_is_not_read() -> None:
    tree, found = yaml_tree.parse_yaml("# " + "x" * yaml_tree.MAX_CHARACTERS)
    assert tree is None
    assert "is larger than" in found[0].message


def test_a_byte_order_mark_does_no_harm() -> None:
    tree, found = yaml_tree.parse_yaml("\ufeffa: 1")
    assert isinstance(tree, MappingValue)
    assert list(tree.entries) == ["a"]
    assert found == []


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n...\n", "\n\n"])
def test_nothing(text: str) -> None:
    tree, found = yaml_tree.parse_yaml(text)
    assert found == []
    assert tree is None or (isinstance(tree, ScalarValue) and tree.text is None)


def test_lists_are_lists() -> None:
    tree, _ = yaml_tree.parse_yaml("- a\n- b\n")
    assert isinstance(tree, ListValue)
    assert tree.size == 3


def test_paths_are_written_as_a_person_would() -> None:
    assert yaml_tree.format_path(("nodes", 2, "ssh", "port")) == "nodes[2].ssh.port"
    assert yaml_tree.format_path(()) == ""
