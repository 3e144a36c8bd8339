"""Checks a document of `status --json` against its schema, ``gpumesh.status/1``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema


def check_status_document(document: Any) -> None:
    """Raises ``jsonschema.ValidationError`` if the document is not as the schema says."""
    _validator().validate(document)


@cache
def _validator() -> jsonschema.Draft202012Validator:
    """Made once: ``jsonschema.validate`` would check the schema itself each time, which takes longer."""
    schema = json.loads((Path(__file__).parent / "real" / "status_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)
