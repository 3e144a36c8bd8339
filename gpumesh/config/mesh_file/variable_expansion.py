"""The tree as plain values, with ``${VAR}`` expanded. Pure: the variables are given.

Secrets are not expanded: the specs, the effective configuration and a command's arguments would hold them then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gpumesh.config.credentials import names_secret
from gpumesh.config.mesh_file.yaml_tree import Fault, KeyPath, ListValue, MappingValue, ScalarValue, Value

MAX_EXPANDED = 8192

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<body>[^}]*)(?P<end>\}?)")
_BODY = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>.*))?", re.DOTALL)


class Unusable:
    """Stands where a value is broken: of no type that any key takes."""


UNUSABLE = Unusable()


def expand_tree(value: Value, env: Mapping[str, str], path: KeyPath = ()) -> tuple[Any, list[Fault]]:
    """Dictionaries, lists, strings and ``None``; ``UNUSABLE`` where something is wrong, with the reason."""
    if isinstance(value, ScalarValue):
        if value.text is None or "${" not in value.text:
            return value.text, []
        try:
            return expand_variables(value.text, env), []
        except ValueError as error:
            return UNUSABLE, [Fault(str(error), value.position, path)]
    faults: list[Fault] = []
    if isinstance(value, ListValue):
        items = []
        for index, item in enumerate(value.values):
            result, more = expand_tree(item, env, (*path, index))
            items.append(result)
            faults += more
        return items, faults
    if isinstance(value, MappingValue):
        entries = {}
        for key, (_, item) in value.entries.items():
            entries[key], more = expand_tree(item, env, (*path, key))
            faults += more
        return entries, faults
    return UNUSABLE, []


def expand_variables(text: str, env: Mapping[str, str]) -> str:
    """``${VAR}``, ``${VAR:-used when VAR is not set or empty}``; ``$${`` is a literal ``${``.

    Raises ValueError, which never holds a variable's value.
    """

    def one(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        body = _BODY.fullmatch(match["body"])
        if not match["end"] or body is None:
            raise ValueError("write ${VAR} or ${VAR:-default}; $${ stands for ${ itself")
        name, default = body["name"], body["default"]
        if names_secret(name):
            raise ValueError(
                f"${{{name}}} holds a secret by its name, and secrets are not copied into the configuration: "
                f"give the variable's name under a key that ends in _env"
            )
        found = env.get(name)
        if default is not None and not found:
            return default
        if found is None:
            raise ValueError(f"the variable {name} is not set; ${{{name}:-default}} would say what to use then")
        return found

    expanded = _REFERENCE.sub(one, text)
    if len(expanded) > MAX_EXPANDED:
        raise ValueError(f"expands to more than {MAX_EXPANDED} characters")
    return expanded
