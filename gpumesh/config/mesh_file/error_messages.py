"""pydantic's errors as sentences for a person, with the place each belongs to. Values are shown as they stand in the
file, before ``${VAR}`` was expanded, and not at all where a secret may be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gpumesh.config.mesh_file.file_schema import MeshFile, Section
from gpumesh.config.mesh_file.yaml_tree import Fault, KeyPath, ListValue, MappingValue, ScalarValue, Value, follow_path
from gpumesh.config.value_parsers import SensitiveError

_EXPECTED_PHRASES = {
    "model_type": "keys with values are",
    "dict_type": "keys with values are",
    "tuple_type": "a list is",
    "string_type": "a single value is",
    "int_type": "a whole number is",
    "float_type": "a number is",
    "bool_type": "true or false is",
    "enum": "a single value is",
}
# Examples of the mappings that people write as plain text instead.
_EXAMPLES = {"ssh": "{host: 203.0.113.7, port: 22}", "backend": "{port: 11434}"}
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
_SYNONYMS = {
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
}
_MAX_QUOTED = 60


def translate_errors(error: ValidationError, tree: Value) -> Iterator[Fault]:
    """Faults in our words, at their positions in the file, from the errors of pydantic."""
    for detail in error.errors(include_url=False):
        yield _translate(detail["type"], detail["loc"], detail.get("ctx", {}), detail["msg"], tree)


def quote_value(text: str) -> str:
    """A value for a sentence: quoted, on one line, cut if long."""
    return repr(text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 1] + "…")


def did_you_mean(word: str, choices: Iterable[str]) -> str | None:
    """The choice that is most similar to ``word``, or ``None`` if none is similar."""
    by_normal_form = {_normalize_key(choice): choice for choice in choices}
    close = difflib.get_close_matches(_normalize_key(word[:64]), by_normal_form, n=1, cutoff=0.6)
    return by_normal_form[close[0]] if close else None


def not_one_of(text: str, choices: list[str]) -> str:
    guess = did_you_mean(text, choices)
    return f"{quote_value(text)} is not one of {', '.join(choices)}" + (f"; did you mean {guess}?" if guess else "")


def _translate(kind: str, path: KeyPath, context: Mapping[str, Any], message: str, tree: Value) -> Fault:
    if kind == "extra_forbidden":
        _, spot, _ = follow_path(tree, path)
        return Fault(_explain_unknown_key(path), spot, path)
    steps, spot, value = follow_path(tree, path)
    if kind == "missing":
        return Fault("is missing", value.position, path)
    # pydantic may name a member of a list that is written as a single value in the file.
    path = path[:steps]
    if kind == "value_error":
        reason = context["error"]
        subject = "this" if isinstance(reason, SensitiveError) else _subject(value)
        return Fault(f"{subject} {reason}", value.position, path)
    if kind == "enum" and isinstance(value, ScalarValue) and value.text is not None:
        return Fault(not_one_of(value.text, re.findall(r"'([^']*)'", context["expected"])), value.position, path)
    if kind == "bool_parsing":
        return Fault(f"{_subject(value)} is neither true nor false", value.position, path)
    if kind in _EXPECTED_PHRASES:
        example = _EXAMPLES.get(str(path[-1])) if path and kind == "model_type" else None
        such = f"; such as `{example}`" if example is not None else ""
        return Fault(
            f"{_EXPECTED_PHRASES[kind]} expected here, not {_describe_value(value)}{such}", value.position, path
        )
    return Fault(f"{_subject(value)}: {message}", value.position, path)


def _subject(value: Value) -> str:
    return quote_value(value.text) if isinstance(value, ScalarValue) and value.text is not None else "this"


def _describe_value(value: Value) -> str:
    if isinstance(value, ScalarValue):
        return "nothing" if value.text is None else f"the text {quote_value(value.text)}"
    if isinstance(value, ListValue):
        return "a list"
    return "keys with values" if isinstance(value, MappingValue) else "this"


def _normalize_key(word: str) -> str:
    return re.sub(r"[\s-]+", "_", word.strip().lower())


def _explain_unknown_key(path: KeyPath) -> str:
    word = str(path[-1])
    known = keys_at(path[:-1])
    normal_form = _normalize_key(word)
    key = next(
        (key for secret, key in _SECRET_KEYS.items() if normal_form == secret or normal_form.endswith(f"_{secret}")),
        None,
    )
    if key is not None:
        if key not in known:
            key = next((other for other in ("password_env", "api_key_env") if other in known), "a key ending in _env")
        return f"a secret may not stand in the file: put it into a variable, and the variable's name under {key}"
    message = f"unknown key {quote_value(word)}"
    guess = _SYNONYMS.get(normal_form)
    if guess not in known:
        guess = did_you_mean(word, known)
    if guess is not None:
        return f"{message}; did you mean {guess}?"
    places = _sections_with_key(normal_form)
    if places:
        return f"{message}; {normal_form} belongs under {' or '.join(places)}"
    return f"{message}; known here: {', '.join(known)}"


def keys_at(path: KeyPath) -> list[str]:
    """The keys that may stand at ``path``."""
    section: type[Section] | None = MeshFile
    for part in path:
        if isinstance(part, str) and section is not None:
            info = section.model_fields.get(part)
            section = _section(info) if info is not None else None
    return list(section.model_fields) if section is not None else []


def _section(info: FieldInfo) -> type[Section] | None:
    pending: list[Any] = [info.annotation]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
        pending.extend(get_args(kind))
    return None


def _sections_with_key(key: str) -> list[str]:
    """The sections that have ``key``, named by the path that a person would write."""
    sections = []
    pending: list[tuple[str, type[Section]]] = [("the top level", MeshFile)]
    while pending:
        where, section = pending.pop(0)
        for name, info in section.model_fields.items():
            if name == key:
                sections.append(where)
            inner = _section(info)
            if inner is not None and name != "defaults":
                label = "a node" if name == "nodes" else name
                pending.append((label, inner))
    return sections
