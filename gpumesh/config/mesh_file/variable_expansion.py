"""Expands ``${VAR}`` and ``${VAR:-default}`` in the tree of a mesh.yaml, and turns the tree into plain values. Pure.

Variables that hold secrets are not expanded: otherwise the specs, the effective configuration and the arguments of
commands would contain the secrets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gpumesh.config.credentials import names_secret
from gpumesh.config.mesh_file.yaml_tree import Fault, KeyPath, ListValue, MappingValue, ScalarValue, Value

MAX_EXPANDED = 8192  # characters of one value, so that a large variable does not fill the specs

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<body>[^}]*)(?P<closing_brace>\}?)")
_BODY = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>.*))?", re.DOTALL)


class Unusable:
    """The placeholder for a broken value, whose fault is reported already. The schema skips it."""


UNUSABLE = Unusable()


def expand_tree(value: Value, env: Mapping[str, str], path: KeyPath = ()) -> tuple[Any, list[Fault]]:
    """Returns the tree as dictionaries, lists, strings and ``None``, with variables expanded; and the faults.

    ``UNUSABLE`` stands in the place of each broken value. ``env`` has the variables; ``path`` is where ``value``
    stands.
    """
    if isinstance(value, ScalarValue):
        if value.text is None or "${" not in value.text:
            return value.text, []
        try:
            return expand_variables(value.text, env), []
        except ValueError as error:
            return UNUSABLE, [Fault(str(error), value.position, path)]
    faults: list[Fault] = []
    if isinstance(value, ListValue):
        members = []
        for index, member in enumerate(value.values):
            result, member_faults = expand_tree(member, env, (*path, index))
            members.append(result)
            faults += member_faults
        return members, faults
    if isinstance(value, MappingValue):
        entries = {}
        for key, (_, member) in value.entries.items():
            entries[key], member_faults = expand_tree(member, env, (*path, key))
            faults += member_faults
        return entries, faults
    return UNUSABLE, []  # a BrokenValue, whose fault is reported already


def find_required_variables(text: str) -> frozenset[str]:
    """The variables that the text of a mesh.yaml needs for its ``${VAR}``: those without a default. Whole lines of
    comment are left out."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    references = (reference for line in lines for reference in _REFERENCE.finditer(line))
    bodies = (_BODY.fullmatch(reference["body"]) for reference in references if reference["body"] is not None)
    return frozenset(body["name"] for body in bodies if body is not None and body["default"] is None)


def expand_variables(text: str, env: Mapping[str, str]) -> str:
    """Expands ``${VAR}`` and ``${VAR:-default}`` in ``text``; ``$${`` gives ``${`` itself.

    The default is used when VAR is empty or not set. Without a default, an empty VAR gives an empty text. Raises
    ValueError (VAR is not set, is not UTF-8 or holds a secret, the syntax is wrong, the result is too long), whose text
    never contains the value of a variable.
    """
    expanded = _REFERENCE.sub(lambda reference: _expand_reference(reference, env), text)
    if len(expanded) > MAX_EXPANDED:
        raise ValueError(f"expands to more than {MAX_EXPANDED} characters")
    return expanded


def _expand_reference(reference: re.Match[str], env: Mapping[str, str]) -> str:
    """Returns the text that replaces one match of ``_REFERENCE``: ``${VAR}``, ``${VAR:-default}`` or ``$${``. Raises
    ValueError as ``expand_variables`` does."""
    if reference[0] == "$${":
        return "${"
    body = _BODY.fullmatch(reference["body"])
    if not reference["closing_brace"] or body is None:
        raise ValueError("write ${VAR} or ${VAR:-default}; $${ stands for ${ itself")
    name, default = body["name"], body["default"]
    if names_secret(name):
        raise ValueError(
            f"${{{name}}} holds a secret by its name, and secrets are not copied into the configuration: "
            f"give the variable's name under a key that ends in _env"
        )
    value = env.get(name)
    if default is not None and not value:
        return default
    if value is None:
        raise ValueError(f"the variable {name} is not set; ${{{name}:-default}} would say what to use then")
    if not _is_unicode(value):
        raise ValueError(f"the value of the variable {name} is not UTF-8")
    return value


def _is_unicode(text: str) -> bool:
    """Whether the text has no surrogates, with which Python stands for the bytes of a variable that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
