"""Writes the schema of mesh.yaml as JSON Schema, for editors."""

from __future__ import annotations

import inspect
from enum import StrEnum
from typing import Any

from gpumesh.config.mesh_file.file_schema import MeshFile
from gpumesh.config.mesh_file.value_types import JsonSchema, Section, Setting, or_null

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"


def make_json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of mesh.yaml."""
    definitions: dict[str, Any] = {}
    pending: list[type[Section | StrEnum]] = [MeshFile]
    while pending:
        definition = pending.pop()
        if definition.__name__ in definitions:
            continue
        definitions[definition.__name__] = _describe(definition)
        if issubclass(definition, Section):
            inner = [setting.value_type.definition for setting in definition.settings.values()]
            pending += [inner_definition for inner_definition in inner if inner_definition is not None]
    document = definitions.pop(MeshFile.__name__)
    return {"$schema": SCHEMA_ID, **_sort_keys({"$defs": definitions, **document, "title": "gpumesh mesh.yaml"})}


def _describe(definition: type[Section | StrEnum]) -> dict[str, Any]:
    """Returns the JSON Schema of a section or an enumeration."""
    schema: dict[str, Any] = {"title": definition.__name__}
    if definition.__doc__ is not None:
        schema["description"] = inspect.cleandoc(definition.__doc__)
    if issubclass(definition, StrEnum):
        return {**schema, "type": "string", "enum": [str(choice) for choice in definition]}
    settings = definition.settings
    schema |= {
        "type": "object",
        "properties": {key: _describe_setting(key, setting) for key, setting in settings.items()},
        "additionalProperties": False,
    }
    required_keys = [key for key, setting in settings.items() if setting.is_required]
    return {**schema, "required": required_keys} if required_keys else schema


def _describe_setting(key: str, setting: Setting) -> JsonSchema:
    """Returns the JSON Schema of one key. A key that is not required may be null."""
    value_schema = setting.value_type.schema
    schema = dict(value_schema) if setting.is_required else {**or_null(value_schema), "default": None}
    if "$ref" not in value_schema:  # a definition has a title of its own
        schema["title"] = key.replace("_", " ").title()
    if setting.description is not None:
        schema["description"] = setting.description
    return schema


def _sort_keys(schema: Any) -> Any:
    """Returns the schema with its keywords in alphabetical order. The keys of sections stay in their own order."""
    if isinstance(schema, list):
        return [_sort_keys(member) for member in schema]
    if not isinstance(schema, dict):
        return schema
    sorted_schema = {}
    for keyword, member in sorted(schema.items()):
        if keyword == "properties":  # its members are the keys of a section
            sorted_schema[keyword] = {key: _sort_keys(value) for key, value in member.items()}
        else:
            sorted_schema[keyword] = _sort_keys(member)
    return sorted_schema
