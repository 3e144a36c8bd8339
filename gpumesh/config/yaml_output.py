"""Writes documents of commands as YAML (`-o yaml`). Texts in them may come from hosts."""

from __future__ import annotations

from typing import Any

import yaml

# Characters that YAML allows and a terminal acts on: C1 controls, and the marks that change the direction of a line.
_UNSAFE = (*range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: f"\\u{code:04x}" for code in _UNSAFE}


def dump_yaml(document: Any) -> str:
    """The document of dictionaries, lists and plain values as YAML, in a form that is safe on a terminal. Ends with a
    line feed."""
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return str(text).translate(_ESCAPES)  # they stand between double quotes only: see ``_represent_text``


class _Dumper(yaml.SafeDumper):
    """Writes no anchors, and quotes texts with unsafe characters."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the base class's signature
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """A text as it is; between double quotes, where escapes are understood, if it has unsafe characters. A lone
    surrogate, which no file can hold, becomes a question mark."""
    text = text.encode("utf-8", "replace").decode()
    is_unsafe = any(ord(character) in _ESCAPES for character in text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if is_unsafe else None)


_Dumper.add_representer(str, _represent_text)
