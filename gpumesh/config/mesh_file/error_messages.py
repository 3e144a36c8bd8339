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

_EXPECTED = {
    "model_type": "keys with values are",
    "dict_type": "keys with values are",
    "tuple_type": "a list is",
    "string_type": "a single value is",
    "int_type": "a whole number is",
    "float_type": "a number is",
    "bool_type": "true or false is",
    "enum": "a single value is",
}
# What a person would rather write there as text, in the form that is read.
_FORMS = {"ssh": "{host: 203.0.113.7, port: 22}", "backend": "{port: 11434}"}
_SECRETS = {
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
_OTHER_WORDS = {
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
_SENTENCE_LIMIT = 60


def translate_errors(error: ValidationError, tree: Value) -> Iterator[Fault]:
    for each in error.errors(include_url=False):
        yield _fault(each["type"], each["loc"], each.get("ctx", {}), each["msg"], tree)


def quote_value(text: str) -> str:
    """A value in a sentence: quoted, on one line, not too long."""
    return repr(text if len(text) <= _SENTENCE_LIMIT else text[: _SENTENCE_LIMIT - 1] + "…")


def did_you_mean(word: str, choices: Iterable[str]) -> str | None:
    by_form = {_form(choice): choice for choice in choices}
    close = difflib.get_close_matches(_form(word[:64]), by_form, n=1, cutoff=0.6)
    return by_form[close[0]] if close else None


def not_one_of(text: str, choices: list[str]) -> str:
    guess = did_you_mean(text, choices)
    return f"{quote_value(text)} is not one of {', '.join(choices)}" + (f"; did you mean {guess}?" if guess else "")


def _fault(kind: str, path: KeyPath, context: Mapping[str, Any], message: str, tree: Value) -> Fault:
    if kind == "extra_forbidden":
        _, spot, _ = follow_path(tree, path)
        return Fault(_unknown(path), spot, path)
    steps, spot, value = follow_path(tree, path)
    if kind == "missing":
        return Fault("is missing", value.position, path)
    # pydantic may name items of what stands as one value in the file.
    path = path[:steps]
    if kind == "value_error":
        reason = context["error"]
        subject = "this" if isinstance(reason, SensitiveError) else _subject(value)
        return Fault(f"{subject} {reason}", value.position, path)
    if kind == "enum" and isinstance(value, ScalarValue) and value.text is not None:
        return Fault(not_one_of(value.text, re.findall(r"'([^']*)'", context["expected"])), value.position, path)
    if kind == "bool_parsing":
        return Fault(f"{_subject(value)} is neither true nor false", value.position, path)
    if kind in _EXPECTED:
        form = _FORMS.get(str(path[-1])) if path and kind == "model_type" else None
        such = f"; such as `{form}`" if form is not None else ""
        return Fault(f"{_EXPECTED[kind]} expected here, not {_kind(value)}{such}", value.position, path)
    return Fault(f"{_subject(value)}: {message}", value.position, path)


def _subject(value: Value) -> str:
    return quote_value(value.text) if isinstance(value, ScalarValue) and value.text is not None else "this"


def _kind(value: Value) -> str:
    if isinstance(value, ScalarValue):
        return "nothing" if value.text is None else f"the text {quote_value(value.text)}"
    if isinstance(value, ListValue):
        return "a list"
    return "keys with values" if isinstance(value, MappingValue) else "this"


def _form(word: str) -> str:
    return re.sub(r"[\s-]+", "_", word.strip().lower())


def _unknown(path: KeyPath) -> str:
    word = str(path[-1])
    known = keys_at(path[:-1])
    form = _form(word)
    key = next((key for secret, key in _SECRETS.items() if form == secret or form.endswith(f"_{secret}")), None)
    if key is not None:
        if key not in known:
            key = next((other for other in ("password_env", "api_key_env") if other in known), "a key ending in _env")
        return f"a secret may not stand in the file: put it into a variable, and the variable's name under {key}"
    message = f"unknown key {quote_value(word)}"
    guess = _OTHER_WORDS.get(form)
    if guess not in known:
        guess = did_you_mean(word, known)
    if guess is not None:
        return f"{message}; did you mean {guess}?"
    places = _places(form)
    if places:
        return f"{message}; {form} belongs under {' or '.join(places)}"
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


def _places(key: str) -> list[str]:
    """The sections that know ``key``, by the path a person would write."""
    found = []
    pending: list[tuple[str, type[Section]]] = [("the top level", MeshFile)]
    while pending:
        where, section = pending.pop(0)
        for name, info in section.model_fields.items():
            if name == key:
                found.append(where)
            inner = _section(info)
            if inner is not None and name != "defaults":
                label = "a node" if name == "nodes" else name
                pending.append((label, inner))
    return found
