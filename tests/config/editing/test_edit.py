"""A value is set, and every other byte of the file stays as it was."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.config.editing import edit
from gpumesh.config.editing.edit import Edit
from gpumesh.config.editing.yaml_positions import CannotEdit
from gpumesh.errors import ConfigError, GPUMeshError
from tests.config.build import topology

ROOT = Path(__file__).parents[3]
OFF = Edit(0, ("enabled",), False, "the same GPU as iceland")
GPUS = Edit(0, ("expect", "gpus"), 2)
GPUS_OF_B = Edit(1, ("expect", "gpus"), 3)


def changed(text: str, *edits: Edit) -> list[str]:
    """The lines that went and came."""
    lines = difflib.unified_diff(text.splitlines(), edit.apply_edits(text, edits).splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


NODE = "nodes:\n  - name: a\n"
FLOW = "nodes: [{name: a, backend: {port: 1}}]\n"

CASES: dict[str, tuple[str, Edit, list[str]]] = {
    "a value in a block": (
        NODE + "    expect:\n      gpus: 1   # one card\n      gpu: x\n",
        GPUS,
        ["-      gpus: 1   # one card", "+      gpus: 2   # one card"],
    ),
    "a value in braces": (
        NODE + "    expect: { gpus: 1, gpu: x } # mine\n",
        GPUS,
        ["-    expect: { gpus: 1, gpu: x } # mine", "+    expect: { gpus: 2, gpu: x } # mine"],
    ),
    "a quoted value": (
        NODE + "    expect: {hostname: 'old # box'}\n",
        Edit(0, ("expect", "hostname"), "new"),
        ["-    expect: {hostname: 'old # box'}", "+    expect: {hostname: new}"],
    ),
    "a value of several lines": (
        NODE + "    expect:\n      gpu: NVIDIA\n        RTX 4090\n      gpus: 1\n",
        Edit(0, ("expect", "gpu"), "NVIDIA H100"),
        ["-      gpu: NVIDIA", "-        RTX 4090", "+      gpu: NVIDIA H100"],
    ),
    "a key that was not there": (
        NODE + "    backend: {port: 1}  # its port\n\n# the end\n",
        OFF,
        ["+    enabled: false # the same GPU as iceland"],
    ),
    "a key after a list": (
        NODE + "    expect:\n      models:\n        - a\n        - b # two\n\n    # about c\n  - name: c\n",
        OFF,
        ["+    enabled: false # the same GPU as iceland"],
    ),
    "a key in a file without a last line's end": (
        "nodes:\n- name: a\n  backend: {port: 1}",
        OFF,
        ["+  enabled: false # the same GPU as iceland"],
    ),
    "a switch that was on": (
        NODE + "    enabled: true # really\n",
        OFF,
        ["-    enabled: true # really", "+    enabled: false # really"],
    ),
    "a switch without a value": (NODE + "    enabled:\n", OFF, ["-    enabled:", "+    enabled: false"]),
    "a table that was not there": (NODE, GPUS, ["+    expect: { gpus: 2 }"]),
    "after a key without a value": (NODE + "    expect:\n", OFF, ["+    enabled: false # the same GPU as iceland"]),
    "an empty table": (NODE + "    expect: {}\n", GPUS, ["-    expect: {}", "+    expect: { gpus: 2 }"]),
    "a comment in empty braces": (
        NODE + "    expect: { # keep me\n    }\n",
        GPUS,
        ["-    expect: { # keep me", "+    expect: { gpus: 2 # keep me"],
    ),
    "a comment directly behind an empty table's brace": (
        NODE + "    expect: {# keep me\n    }\n",
        GPUS,
        ["-    expect: {# keep me", "+    expect: {gpus: 2 # keep me"],
    ),
    "a line of its own for a comment in empty braces": (
        NODE + "    expect: {\n      # keep me\n    } # mine\n",
        GPUS,
        ["-    expect: {", "+    expect: {gpus: 2"],
    ),
    "into braces": (
        NODE + "    expect: {gpu: x}\n",
        GPUS,
        ["-    expect: {gpu: x}", "+    expect: {gpu: x, gpus: 2}"],
    ),
    "into braces with blanks": (
        NODE + "    expect: { gpu: x }\n",
        GPUS,
        ["-    expect: { gpu: x }", "+    expect: { gpu: x, gpus: 2 }"],
    ),
    "into braces with a comma at their end": (
        NODE + "    expect: {gpu: x,}\n",
        GPUS,
        ["-    expect: {gpu: x,}", "+    expect: {gpus: 2, gpu: x,}"],
    ),
    "into braces over lines": (
        NODE + "    expect: {\n      gpu: x, # mine\n    }\n",
        GPUS,
        ["-    expect: {", "+    expect: {gpus: 2,"],
    ),
    "a node in braces": (
        "nodes:\n  - {name: a, backend: {port: 1}}\n  - {name: b}\n",
        OFF,
        [
            "-  - {name: a, backend: {port: 1}}",
            "+  - {name: a, backend: {port: 1}, enabled: false} # the same GPU as iceland",
        ],
    ),
    "a node in a list in brackets": (
        FLOW,
        OFF,
        ["-" + FLOW.strip(), "+nodes: [{name: a, backend: {port: 1}, enabled: false}]"],
    ),
    "JSON stays JSON": (
        '{"nodes": [{"name": "a", "expect": {"gpus": 1}}]}',
        OFF,
        [
            '-{"nodes": [{"name": "a", "expect": {"gpus": 1}}]}',
            '+{"nodes": [{"name": "a", "expect": {"gpus": 1}, "enabled": false}]}',
        ],
    ),
    "the second node": (
        "nodes:\n- name: a\n- name: b\n- name: c\n",
        Edit(1, ("enabled",), False),
        ["+  enabled: false"],
    ),
    "beside an alias": (
        "nodes:\n- name: a\n  labels: &l {x: y}\n- name: b\n  labels: *l\n- name: c\n",
        Edit(1, ("enabled",), False),
        ["+  enabled: false"],
    ),
    "a merged key gets a value of its own": (
        "x: &e {gpus: 1}\nnodes:\n- name: a\n  expect:\n    <<: *e\n",
        GPUS,
        ["+    gpus: 2"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_only_what_was_meant_changes(name: str) -> None:
    text, one, lines = CASES[name]
    assert changed(text, one) == lines
    found = yaml.safe_load(edit.apply_edits(text, [one]))["nodes"][one.node]
    for key in one.path:
        found = found[key]
    assert found == one.value


@pytest.mark.parametrize("name", CASES)
def test_line_ends_stay_as_they_are(name: str) -> None:
    text, one, _ = CASES[name]
    windows = edit.apply_edits(text.replace("\n", "\r\n"), [one])
    assert windows.replace("\r\n", "\n") == edit.apply_edits(text, [one])
    assert "\n" not in windows.replace("\r\n", "")


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("x: &e {gpus: 1}\nnodes:\n- name: a\n  expect: *e\n", GPUS),
        ("nodes:\n- &n {name: a}\n- *n\n", Edit(1, ("enabled",), False)),
        ("nodes:\n- name: a\n  expect:\n    gpu: |\n      x\n", Edit(0, ("expect", "gpu"), "y")),
        ("nodes:\n- name: a\n  expect:\n    gpu: |\n      x\n", OFF),
        ("nodes:\n- name: a\n  expect: [gpus]\n", GPUS),
        ("nodes:\n- name: a\n  expect: &e {}\n- name: b\n  expect: *e\n", GPUS),
        ("nodes:\n- name: a\n  expect: !!map {gpu: x,}\n", GPUS),
        ("nodes:\n- name: a\n", Edit(1, ("enabled",), False)),
        ("x: &n [{name: a}]\nnodes: *n\n", Edit(0, ("enabled",), False)),
        ("- name: a\n", OFF),
        ("nodes:\n- name: a\n  enabled: [true]\n", OFF),
    ],
)
def test_what_cannot_be_set_alone_is_refused(text: str, one: Edit) -> None:
    with pytest.raises(CannotEdit) as caught:
        edit.apply_edits(text, [one])
    assert caught.value.hint == "change it by hand"


VALUES = st.one_of(
    st.booleans(),
    st.integers(-(10**6), 10**9),
    st.sampled_from(
        ("yes", "null", "1e3", "22:30", "a: b", "#x", "- x", "*a", "&a", "!t", "", " x ", '"', "'", "\\", "${X}", "x,y")
    ),
    st.text(alphabet=st.characters(max_codepoint=0x24F, exclude_categories=("Cc", "Cf")), max_size=20),
)


@given(VALUES, st.sampled_from(["    expect: {gpu: x}\n", "    expect:\n      gpu: x\n", "    weight: 1\n", ""]))
def test_any_value_is_read_back_by_every_reader(value: str | int | bool, rest: str) -> None:
    text = edit.apply_edits("nodes:\n  - name: a\n" + rest, [Edit(0, ("expect", "gpu"), value)])
    found = yaml.safe_load(text)["nodes"][0]["expect"]["gpu"]
    expected = value.replace("${", "$${") if isinstance(value, str) else value
    assert found == expected
    assert type(found) is type(value)


FILES = [ROOT / "mesh.yaml", *sorted((ROOT / "examples").glob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_files_that_people_start_from(path: Path) -> None:
    text = path.read_text()
    nodes = yaml.safe_load(text)["nodes"]
    for number in range(len(nodes)):
        lines = changed(text, Edit(number, ("enabled",), False, "why"), Edit(number, ("expect", "gpus"), 7))
        assert len(lines) <= 4
        after = yaml.safe_load(edit.apply_edits(text, [Edit(number, ("expect", "gpus"), 7)]))["nodes"]
        assert after[number]["expect"].pop("gpus") == 7
        assert [node.get("name") for node in after] == [node.get("name") for node in nodes]


def test_several_edits_follow_each_other() -> None:
    text = edit.apply_edits(
        "nodes:\n- name: a\n  ssh: {host: h}\n- name: b\n  ssh: {host: h}\n", [OFF, GPUS, GPUS_OF_B]
    )
    assert text == (
        "nodes:\n- name: a\n  ssh: {host: h}\n  enabled: false # the same GPU as iceland\n  expect: { gpus: 2 }\n"
        "- name: b\n  ssh: {host: h}\n  expect: { gpus: 3 }\n"
    )
    assert [node.expect.gpus for node in topology(text).nodes] == [2, 3]


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text("nodes:\n- name: a\n")
    path.chmod(0o640)
    return path


def test_a_file_is_replaced_with_its_mode(file: Path) -> None:
    before = file.stat().st_ino
    edit.write(file, edit.read(file), "nodes:\n- name: b\n")
    assert file.read_text() == "nodes:\n- name: b\n"
    assert (file.stat().st_mode & 0o777, file.stat().st_ino != before) == (0o640, True)
    assert os.listdir(file.parent) == ["mesh.yaml"]


def test_a_link_stays_a_link(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere"
    link.symlink_to(file)
    edit.write(link, edit.read(link), "nodes:\n- name: b\n")
    assert link.is_symlink()
    assert file.read_text() == "nodes:\n- name: b\n"


def test_a_file_that_was_changed_meanwhile_is_left(file: Path) -> None:
    with pytest.raises(GPUMeshError, match="changed meanwhile"):
        edit.write(file, "nodes:\n- name: older\n", "nodes:\n- name: b\n")
    assert file.read_text() == "nodes:\n- name: a\n"


@pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
def test_nothing_is_half_written(file: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The disk is full at the last step: the old file is there, and nothing beside it."""

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, no_space)
    old = edit.read(file)
    with pytest.raises(GPUMeshError, match="No space left"):
        edit.write(file, old, "nodes:\n- name: b\n")
    assert file.read_text() == old
    assert os.listdir(file.parent) == ["mesh.yaml"]


def test_what_the_new_text_would_mean(file: Path) -> None:
    assert edit.parse_edited(file, "nodes: [{name: b, backend: {url: 'http://127.0.0.1:1'}}]\n").nodes[0].name == "b"
    with pytest.raises(ConfigError):
        edit.parse_edited(file, "nodes:\n- nmae: b\n")
