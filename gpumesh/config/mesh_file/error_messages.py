"""Turns the problems that the schema finds into messages for a person, with "did you mean" and a position.

A value is shown as it stands in the file, before ``${VAR}`` was expanded. A value that may be a secret is not shown.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from gpumesh.config.mesh_file.file_schema import ApiKey, MeshFile, Model, Node, Pool, PoolNode
from gpumesh.config.mesh_file.value_types import (
    KEYS_WITH_VALUES,
    KeyProblem,
    MappingOf,
    NotAChoice,
    Section,
    ValueProblem,
    ValueType,
    WrongType,
)
from gpumesh.config.mesh_file.yaml_tree import Fault, KeyPath, ListValue, MappingValue, ScalarValue, Value, follow_path
from gpumesh.config.value_parsers import SensitiveError

# Examples of the mappings that people write as plain text instead.
_EXAMPLES = {"ssh": "{host: 203.0.113.7, port: 22}", "backend": "{port: 11434}"}
# Keys under which people write a secret itself, and the keys that name its variable instead.
_SECRET_KEYS = {
    "password": "password_env",
    "passwd": "password_env",
    "pass": "password_env",
    "passphrase": "passphrase_env",
    "api_key": "api_key_env",
    "apikey": "api_key_env",
    "key": "api_key_env",
    "token": "api_key_env",
    "bearer": "api_key_env",
    "secret": "api_key_env",
}
# Keys that other programs use, and our key for the same setting.
_SYNONYMS = {
    "name": "node",  # of a pool
    "hostname": "host",
    "address": "host",
    "ip": "host",
    "username": "user",
    "key_file": "identity_file",
    "keyfile": "identity_file",
    "private_key": "identity_file",
    "identity": "identity_file",
    "jump": "proxy_jump",
    "bastion": "proxy_jump",
    "type": "kind",
    "endpoint": "url",
    "base_url": "url",
    "concurrency": "max_parallel",
    "parallel": "max_parallel",
    "tags": "labels",
    "vram": "vram_mib",
    **dict.fromkeys(("ctx", "ctx_size", "num_ctx", "n_ctx", "context_length"), "context"),
    **dict.fromkeys(("members", "hosts", "workers"), "nodes"),
    **dict.fromkeys(("slots", "streams", "num_parallel"), "parallel"),
    **dict.fromkeys(("cache_type", "cache_type_k", "kv_cache_type"), "kv_type"),
    **dict.fromkeys(("gguf", "model_path"), "model"),
    "master": "head",
    "tensor_split": "split",
    "max_memory": "memory",
}
# How a person names the sections that stand in a list or under names of their own.
_SECTION_LABELS: dict[type[Section], str] = {
    Node: "a node",
    ApiKey: "a key of the gateway",
    Model: "a model",
    Pool: "a pool",
    PoolNode: "a node of a pool",
}
_MAX_QUOTED = 60  # characters


def explain_problems(problems: Iterable[ValueProblem], tree: Value) -> Iterator[Fault]:
    """Yields each problem as a fault with a message and its position in ``tree``, the file."""
    for problem in problems:
        yield _explain(problem, tree)


def quote_value(text: str) -> str:
    """Returns a value for a sentence: quoted, on one line, cut if long."""
    return repr(text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 1] + "…")


def did_you_mean(word: str, choices: Iterable[str]) -> str | None:
    """Returns the choice that is most similar to ``word``; ``None`` if no choice is similar."""
    choice_by_form = {_normalize_key(choice): choice for choice in choices}
    short_word = word[:64]  # the comparison takes long for a long word
    similar_forms = difflib.get_close_matches(_normalize_key(short_word), choice_by_form, n=1, cutoff=0.6)
    return choice_by_form[similar_forms[0]] if similar_forms else None


def not_one_of(text: str, choices: list[str]) -> str:
    """Returns the message for a value that is none of ``choices``."""
    message = f"{quote_value(text)} is not one of {', '.join(choices)}"
    guess = did_you_mean(text, choices)
    return message if guess is None else f"{message}; did you mean {guess}?"


def _explain(problem: ValueProblem, tree: Value) -> Fault:
    """Returns the fault for one problem. ``tree`` is the file."""
    path, reason = problem.path, problem.reason
    steps, position, value = follow_path(tree, path)
    if reason is KeyProblem.UNKNOWN:
        return Fault(_explain_unknown_key(path), position, path)
    if reason is KeyProblem.MISSING:
        return Fault("is missing", value.position, path)
    # A single value in the place of a list has a path as if it stood in a list: cut the path where the value stands.
    path = path[:steps]
    return Fault(_explain_value(reason, path, value), value.position, path)


def _explain_value(reason: WrongType | NotAChoice | ValueError, path: KeyPath, value: Value) -> str:
    """Returns the message for a wrong value, which stands at ``path``."""
    if isinstance(reason, WrongType):
        example = _EXAMPLES.get(str(path[-1])) if path and reason.expected == KEYS_WITH_VALUES else None
        such_as = f"; such as `{example}`" if example is not None else ""
        return f"{reason.expected} expected here, not {_describe_value(value)}{such_as}"
    if isinstance(reason, NotAChoice):
        text = value.text if isinstance(value, ScalarValue) else None
        return not_one_of(text or "", reason.choices)
    subject = "this" if isinstance(reason, SensitiveError) else _subject(value)
    return f"{subject} {reason}"


def _subject(value: Value) -> str:
    """Returns the value as the subject of a sentence: quoted if it is a text, otherwise ``this``."""
    return quote_value(value.text) if isinstance(value, ScalarValue) and value.text is not None else "this"


def _describe_value(value: Value) -> str:
    """Returns words for the kind of the value, for a sentence that ends with "not a list" or the like."""
    if isinstance(value, ScalarValue):
        return "nothing" if value.text is None else f"the text {quote_value(value.text)}"
    if isinstance(value, ListValue):
        return "a list"
    return "keys with values" if isinstance(value, MappingValue) else "this"


def _normalize_key(key: str) -> str:
    """Returns the key in lower case with underscores, so that ``Proxy Jump`` and ``proxy-jump`` are ``proxy_jump``."""
    return re.sub(r"[\s-]+", "_", key.strip().lower())


def _explain_unknown_key(path: KeyPath) -> str:
    """Returns the message for an unknown key at ``path``: that it holds a secret, or which key was probably meant."""
    unknown_key = str(path[-1])
    known_keys = keys_at(path[:-1])
    normal_form = _normalize_key(unknown_key)
    variable_key = _find_variable_key(normal_form, known_keys)
    if variable_key is not None:
        return (
            f"a secret may not stand in the file: put it into a variable, and the variable's name under {variable_key}"
        )
    message = f"unknown key {quote_value(unknown_key)}"
    guess = _SYNONYMS.get(normal_form)
    if guess not in known_keys:  # there is no synonym, or it belongs under another section
        guess = did_you_mean(unknown_key, known_keys)
    if guess is not None:
        return f"{message}; did you mean {guess}?"
    sections = _sections_with_key(normal_form)
    if sections:
        return f"{message}; {normal_form} belongs under {' or '.join(sections)}"
    return f"{message}; known here: {', '.join(known_keys)}"


def _find_variable_key(normal_form: str, known_keys: list[str]) -> str | None:
    """If the unknown key holds a secret itself, returns the key that names the secret's variable: ``password_env`` for
    ``password``. Otherwise returns ``None``.

    The key must be one of ``known_keys``, which may stand at the same place. If none of them fits, the text "a key
    ending in _env" is returned.
    """
    variable_keys = [
        variable_key
        for secret_key, variable_key in _SECRET_KEYS.items()
        if normal_form == secret_key or normal_form.endswith(f"_{secret_key}")
    ]
    if not variable_keys:
        return None
    for key in (variable_keys[0], "password_env", "api_key_env", "env"):
        if key in known_keys:
            return key
    return "a key ending in _env"


def keys_at(path: KeyPath) -> list[str]:
    """Returns the keys that may stand in the section at ``path``; an empty list if there is no such section."""
    section: type[Section] | None = MeshFile
    is_name = False  # whether the next part is a name that the user gave, in a mapping such as ``models``
    for part in path:
        if section is None:  # the path has left the sections
            continue
        if isinstance(part, int):  # the index of a list: all members of a list are sections of one type
            continue
        if is_name:
            is_name = False
            continue
        setting = section.settings.get(part)
        section = _section_in(setting.value_type) if setting is not None else None
        is_name = section is not None and setting is not None and isinstance(setting.value_type, MappingOf)
    if section is None or is_name:  # under ``models`` any key may stand
        return []
    return list(section.settings)


def _section_in(value_type: ValueType[Any]) -> type[Section] | None:
    """Returns the section that a value is or that its members are; ``None`` for plain values."""
    definition = value_type.definition
    return definition if definition is not None and issubclass(definition, Section) else None


def _sections_with_key(key: str) -> list[str]:
    """Returns the names of the sections that have ``key``, as a person would name them."""
    sections = []
    pending: list[tuple[str, type[Section]]] = [("the top level", MeshFile)]
    while pending:
        section_label, section = pending.pop(0)
        for name, setting in section.settings.items():
            if name == key:
                sections.append(section_label)
            inner_section = _section_in(setting.value_type)
            if inner_section is not None and name != "defaults":  # `defaults` has only keys that a node has too
                pending.append((_SECTION_LABELS.get(inner_section, name), inner_section))
    return sections
