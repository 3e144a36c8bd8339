from __future__ import annotations

from gpumesh.config.mesh_file.json_schema import make_json_schema


def test_every_section_refuses_keys_that_it_does_not_know() -> None:
    document = make_json_schema()
    for name, section in {"MeshFile": document, **document["$defs"]}.items():
        if section.get("type") == "object" and "properties" in section:
            assert section["additionalProperties"] is False, name


def test_it_tells_an_editor_the_form_of_each_key() -> None:
    document = make_json_schema()
    assert document["required"] == ["nodes"]
    node = document["$defs"]["Node"]
    assert node["required"] == ["name"]
    assert node["properties"]["tier"] == {
        "anyOf": [{"type": "integer", "minimum": 1, "maximum": 1000}, {"type": "null"}],
        "default": None,
        "description": "1 if not given. A node of a higher tier is used only when the lower ones are full, away or much"
        " slower.",
        "title": "Tier",
    }
    assert node["properties"]["ssh"]["anyOf"] == [{"$ref": "#/$defs/Ssh"}, {"type": "null"}]
    (labels, _) = node["properties"]["labels"]["anyOf"]
    assert list(labels["patternProperties"].values()) == [{"type": "string"}]
    assert document["$defs"]["TunnelListen"]["enum"] == ["tcp", "unix"]


def test_every_definition_is_used_and_every_reference_has_one() -> None:
    document = make_json_schema()
    references = set()
    pending: list[object] = [document]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            references |= {part["$ref"]} if "$ref" in part else set()
            pending += part.values()
        elif isinstance(part, list):
            pending += part
    assert references == {f"#/$defs/{name}" for name in document["$defs"]}
