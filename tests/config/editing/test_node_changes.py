"""Whole nodes are added to mesh.yaml, removed and replaced; every other byte of the file stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.config.editing import edit, node_changes
from gpumesh.config.editing.edit import Edit
from gpumesh.config.editing.yaml_positions import CannotEdit
from gpumesh.errors import ConfigError, UsageError

FILE = Path("/nowhere/mesh.yaml")
LINES = (
    "- name: new",
    "  # a note",
    '  ssh: {host: 203.0.113.7, port: 17445, identity_file: "~/k$${x}"}',
    "  backend: {port: 80}",
)
A = "  - name: a\n    backend: {url: http://127.0.0.1:1}\n"
B = "  - name: b\n    backend: {url: http://127.0.0.1:2}\n"
NEW = "".join(f"  {line}\n" for line in LINES)
FLOW_NEW = '{name: new, ssh: {host: 203.0.113.7, port: 17445, identity_file: "~/k$${x}"}, backend: {port: 80}}'
JSON_NEW = (
    '{"name": "new", "ssh": {"host": "203.0.113.7", "port": 17445, "identity_file": "~/k$${x}"}, '
    '"backend": {"port": 80}}'
)
FLOW_A = "{name: a, backend: {url: 'http://127.0.0.1:1'}}"
FLOW_B = "{name: b, backend: {url: 'http://127.0.0.1:2'}}"

# By name: the file, then the file with the new node.
ADDED = {
    "at the end": (f"nodes:\n{A}", f"nodes:\n{A}{NEW}"),
    "before another section": (f"nodes:\n{A}\n# rules\nmodels: {{}}\n", f"nodes:\n{A}{NEW}\n# rules\nmodels: {{}}\n"),
    "after comments of the last node": (
        f"nodes:\n{A}    # its spare port is 81\n# the end\n",
        f"nodes:\n{A}    # its spare port is 81\n{NEW}# the end\n",
    ),
    "before a comment after the list": (f"nodes:\n{A}\n# the end", f"nodes:\n{A}{NEW}\n# the end"),
    "nodes with a blank line between": (f"nodes:\n{A}\n{B}", f"nodes:\n{A}\n{B}\n{NEW}"),
    "no line break at the end": (f"nodes:\n{A}".rstrip(), f"nodes:\n{A}{NEW}".rstrip()),
    "a list without indentation": (
        "nodes:\n- name: a\n  backend: {url: http://127.0.0.1:1}\ngateway: {}\n",
        "nodes:\n- name: a\n  backend: {url: http://127.0.0.1:1}\n" + "\n".join(LINES) + "\ngateway: {}\n",
    ),
    "a dash on a line of its own": (
        "nodes:\n  -\n    name: a\n    backend: {url: http://127.0.0.1:1}\n",
        f"nodes:\n  -\n    name: a\n    backend: {{url: http://127.0.0.1:1}}\n{NEW}",
    ),
    "an anchor": (f"nodes:\n{A.replace('- name', '- &base' + chr(10) + '    name')}", None),
    "windows": (f"nodes:\n{A}name: x\n".replace("\n", "\r\n"), f"nodes:\n{A}{NEW}name: x\n".replace("\n", "\r\n")),
    "a mark of the byte order": (f"\ufeffnodes:\n{A}name: x\n", f"\ufeffnodes:\n{A}{NEW}name: x\n"),
    "a text block at the end of the node": (
        f"nodes:\n{A}    labels:\n      note: >-\n        two\n        lines\n\nname: x\n",
        f"nodes:\n{A}    labels:\n      note: >-\n        two\n        lines\n{NEW}\nname: x\n",
    ),
    "a value in quotes over two lines": (
        f'nodes:\n{A}    labels: {{note: "two\n      lines"}}\n',
        f'nodes:\n{A}    labels: {{note: "two\n      lines"}}\n{NEW}',
    ),
    "in brackets": (f"nodes: [{FLOW_A}] # mine\n", f"nodes: [{FLOW_A}, {FLOW_NEW}] # mine\n"),
    "in brackets on lines": (
        f"nodes: [\n  {FLOW_A}, # one\n  {FLOW_B}  # two\n]\n",
        f"nodes: [\n  {FLOW_A}, # one\n  {FLOW_B},  # two\n  {FLOW_NEW}\n]\n",
    ),
    "in brackets with a comma at the end": (
        f"nodes: [\n  {FLOW_A},\n]\n",
        f"nodes: [\n  {FLOW_A},\n  {FLOW_NEW},\n]\n",
    ),
    "entries in braces in a block": (f"nodes:\n  - {FLOW_A}\n", f"nodes:\n  - {FLOW_A}\n{NEW}"),
    "json": (
        json.dumps({"nodes": [{"name": "a", "backend": {"url": "http://127.0.0.1:1"}}]}),
        json.dumps({"nodes": [{"name": "a", "backend": {"url": "http://127.0.0.1:1"}}]})[:-2] + f", {JSON_NEW}]}}",
    ),
    "json on lines": (
        '{\n "nodes": [\n  {\n   "name": "a", "backend": {"url": "http://127.0.0.1:1"}\n  }\n ],\n "version": 1\n}\n',
        '{\n "nodes": [\n  {\n   "name": "a", "backend": {"url": "http://127.0.0.1:1"}\n  },\n  '
        + JSON_NEW
        + '\n ],\n "version": 1\n}\n',
    ),
    "an empty list": (
        "version: 1\nnodes: []  # none yet\nname: x\n",
        f"version: 1\nnodes:  # none yet\n{NEW}name: x\n",
    ),
    "no list": ("version: 1\nnodes:\n\n# rules\nname: x\n", f"version: 1\nnodes:\n{NEW}\n# rules\nname: x\n"),
    "no key": ("version: 1", f"version: 1\nnodes:\n{NEW}"),
}


@pytest.mark.parametrize("case", ADDED)
def test_a_node_is_added(case: str) -> None:
    text, expected = ADDED[case]
    changed = node_changes.add_node(FILE, text, LINES)
    if expected is not None:
        assert changed.text == expected
    new = changed.topology.nodes[-1]
    assert (new.name, new.ssh and new.ssh.port, new.backend.targets[0].port) == ("new", 17445, 80)
    assert new.ssh is not None
    assert new.ssh.identity_files[0].name == "k${x}", "no variable is read in a text that a person typed"


@pytest.mark.parametrize("case", [case for case in ADDED if case not in ("an empty list", "no list", "no key")])
def test_a_node_that_was_added_is_removed_without_a_trace(case: str) -> None:
    text, _ = ADDED[case]
    added = node_changes.add_node(FILE, text, LINES).text
    removed = node_changes.remove_nodes(FILE, added, ["new"])
    assert removed.text == text
    assert "203.0.113.7" in removed.removed[0]


BLOCK = f"""# mine
nodes:
  # all my pods
{A}    # about a

  # about b
{B}
  # - name: old
  #   backend: {{url: http://127.0.0.1:3}}
  - name: c   # the third
    backend:
      url: http://127.0.0.1:4

name: x
"""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a"], BLOCK.replace(f"{A}    # about a\n\n", "")),
        (["b"], BLOCK.replace(f"\n  # about b\n{B}", "")),
        (["c"], BLOCK.replace("  - name: c   # the third\n    backend:\n      url: http://127.0.0.1:4\n", "")),
        (["c", "a"], None),
    ],
)
def test_a_node_is_removed_with_its_comments(names: list[str], expected: str | None) -> None:
    changed = node_changes.remove_nodes(FILE, BLOCK, names)
    if expected is not None:
        assert changed.text == expected
    assert [node.name for node in changed.topology.nodes] == [name for name in "abc" if name not in names]
    assert "# mine" in changed.text
    assert "# all my pods" in changed.text
    assert "#   backend" in changed.text, "a node that was switched off by comments is the person's"


@pytest.mark.parametrize("windows", [False, True])
def test_removed_from_brackets(windows: bool) -> None:
    text = f"nodes: [\n  {FLOW_A}, # one\n  {FLOW_B}, # two\n  {FLOW_B.replace('name: b', 'name: c')} # three\n]\n"
    expected = {
        "a": f"nodes: [\n  {FLOW_B}, # two\n  {FLOW_B.replace('name: b', 'name: c')} # three\n]\n",
        "c": f"nodes: [\n  {FLOW_A}, # one\n  {FLOW_B} # two\n]\n",
    }
    for name, left in expected.items():
        given_text = text.replace("\n", "\r\n") if windows else text
        assert node_changes.remove_nodes(FILE, given_text, [name]).text == (
            left.replace("\n", "\r\n") if windows else left
        )


POOL = "pools:\n  - {name: p, model: m, nodes: [a, b]}\n"


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        (f"nodes:\n{A}", ["a"], "only node"),
        (f"nodes:\n{A}{B}", ["a", "b"], "all nodes"),
        (f"nodes:\n{A}{B}", ["z"], "there is no node 'z'"),
        (f"nodes:\n{A}{B}models:\n  q: {{nodes: [b]}}\n", ["b"], r"models.q.nodes\[0\]: there is no node 'b'"),
        (f"nodes:\n{A}{B}{POOL}", ["b"], r"pools\[0\].nodes\[1\]: there is no node 'b'"),
        (f"nodes:\n{A}{B}{POOL}", ["p"], "p is a pool, and no node"),
        (
            "nodes:\n  - &x\n    name: a\n    backend: {url: http://h:1}\n  - {<<: *x, name: b}\n",
            ["a"],
            "cannot be removed",
        ),
        ("x: &n\n" + A + "nodes: *n\n", ["a"], "x: "),
    ],
)
def test_what_cannot_be_removed(text: str, names: list[str], message: str) -> None:
    with pytest.raises((UsageError, CannotEdit), match=message):
        node_changes.remove_nodes(FILE, text, names)


def test_an_alias_is_left_to_the_person() -> None:
    text = "defaults: {ssh: {user: root}}\nnodes: &n\n" + A
    assert node_changes.add_node(FILE, text, LINES).text == text + NEW
    with pytest.raises((CannotEdit, ConfigError)):
        node_changes.add_node(FILE, "version: &v 1\nnodes: *v\n", LINES)
    with pytest.raises(ConfigError):
        node_changes.add_node(FILE, f"nodes:\n{A}    nonsense: 1\n", LINES)


def test_an_entry_is_replaced() -> None:
    text = BLOCK.replace("\n", "\r\n")
    changed = node_changes.replace_node(
        FILE, text, "b", "  - name: bb\n    backend: {url: http://127.0.0.1:9}\n    weight: 2"
    )
    expected = BLOCK.replace(B, "  - name: bb\n    backend: {url: http://127.0.0.1:9}\n    weight: 2\n")
    assert changed.text == expected.replace("\n", "\r\n")
    flow = f"nodes: [{FLOW_A}, {FLOW_B}]\n"
    assert node_changes.replace_node(FILE, flow, "a", FLOW_A.replace("a,", "aa,")).text == flow.replace(
        "name: a", "name: aa"
    )
    with pytest.raises(CannotEdit, match="more than b"):
        node_changes.replace_node(FILE, BLOCK, "b", f"{B}  - name: d\n    backend: {{url: http://127.0.0.1:9}}\n")
    with pytest.raises(UsageError, match=r"^nodes\[1\]: has neither"):
        node_changes.replace_node(FILE, BLOCK, "b", "  - name: b\n")
    with pytest.raises(UsageError, match=r"^weigth: unknown key 'weigth'; did you mean weight"):
        node_changes.replace_node(FILE, BLOCK, "b", f"{B}    weigth: 1\n")
    with pytest.raises(UsageError, match=r"^line 3: "):
        node_changes.replace_node(FILE, BLOCK, "b", f"{B}    labels: {{x: y}}}}\n")


def test_values_are_set() -> None:
    edits = [
        Edit(1, ("weight",), 0.5),
        Edit(1, ("expect", "models"), ("qwen2.5:7b", "a")),
        Edit(1, ("enabled",), False),
    ]
    changed = node_changes.set_values(FILE, BLOCK, "b", edits)
    node = changed.topology.nodes[1]
    assert (node.weight, node.expect.models, node.enabled) == (0.5, ("qwen2.5:7b", "a"), False)
    assert '    expect: { models: ["qwen2.5:7b", a] }\n' in changed.text
    again = node_changes.set_values(FILE, changed.text, "b", [Edit(1, ("expect", "models"), ("b",))])
    assert again.topology.nodes[1].expect.models == ("b",)


@pytest.mark.parametrize("link", [False, True])
def test_a_read_only_file_is_left_alone_and_a_link_stays_one(tmp_path: Path, link: bool) -> None:
    file = tmp_path / "real.yaml"
    file.write_text(f"nodes:\n{A}")
    path = file
    if link:
        path = tmp_path / "mesh.yaml"
        path.symlink_to(file)
    file.chmod(0o640)
    edit.write(path, f"nodes:\n{A}", f"nodes:\n{A}{B}")
    assert (path.is_symlink(), file.read_text(), file.stat().st_mode & 0o777) == (link, f"nodes:\n{A}{B}", 0o640)


COMMENT = st.sampled_from(["", "  # deep\n", "# at the start\n", "\n", "    # very deep\n", "\n# own paragraph\n\n"])
NODE = st.sampled_from(
    [
        "  - name: {}\n    backend: {{url: http://127.0.0.1:1}}\n",
        "  - {{name: {}, backend: {{url: 'http://127.0.0.1:1'}}}} # {{ braces }}\n",
        "  - backend:\n      urls:\n        - http://127.0.0.1:1\n        - http://127.0.0.1:2\n    name: '{}'\n",
        "  -   name: {}\n      backend: {{url: http://127.0.0.1:1}}\n      labels:\n        x: >-\n          y\n\n",
    ]
)


@given(st.lists(st.tuples(NODE, COMMENT), min_size=2, max_size=5), st.data(), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_list_keeps_its_other_lines(
    parts: list[tuple[str, str]], data: st.DataObject, windows: bool, cut: bool
) -> None:
    names = [f"n{number}" for number in range(len(parts))]
    text = "name: x # first\nnodes:\n" + "".join(
        node.format(name) + comment for name, (node, comment) in zip(names, parts, strict=True)
    )
    if cut:
        text = text.rstrip("\n")
    if windows:
        text = text.replace("\n", "\r\n")
    added = node_changes.add_node(FILE, text, LINES).text
    lines, old_lines = added.splitlines(), text.splitlines()
    assert [line for line in lines if line in old_lines or not line.strip()] != []
    assert "".join(line for line in lines if line.strip()).replace("".join(NEW.splitlines()), "") == "".join(
        line for line in old_lines if line.strip()
    )
    victim = data.draw(st.sampled_from(names))
    removed = node_changes.remove_nodes(FILE, text, [victim])
    remaining = yaml.safe_load(removed.text)["nodes"]
    assert [node["name"] for node in remaining] == [name for name in names if name != victim]
    gone = set(old_lines) - set(removed.text.splitlines())
    assert all(line in removed.removed[0] for line in gone)
