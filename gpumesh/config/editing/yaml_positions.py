"""Finds the positions of values in the text of a mesh.yaml, for edits that leave every other byte as it was. Pure."""

from __future__ import annotations

import re

import yaml

from gpumesh.errors import GPUMeshError

_ALIAS_TAG = "alias"  # the tag of a scalar that stands for an alias in the tree
_LINE_BREAK = re.compile(r"[\r\n]")


class CannotEdit(GPUMeshError):
    """The value is written in a way that only a person can change."""

    code = "config-edit"
    default_hint = "change it by hand"


class _Loader(yaml.SafeLoader):
    """PyYAML's parser in Python: its marks count characters, while the marks of libyaml may not."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As the base class, but does not resolve an alias: an edit of its target would change other values, too."""
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]  # its stubs have no types here
            return yaml.ScalarNode(_ALIAS_TAG, event.anchor, event.start_mark, event.end_mark)
        return super().compose_node(parent, index)


def compose(text: str) -> yaml.Node | None:
    """Returns the tree of a valid YAML text, with a scalar in the place of each alias; ``None`` for an empty text."""
    return yaml.compose(text, Loader=_Loader)


def find_value(mapping: yaml.MappingNode, key: str) -> yaml.Node | None:
    """Returns the value of ``key`` in the mapping; ``None`` if the mapping has no such key."""
    value: yaml.Node
    for key_node, value in mapping.value:
        if isinstance(key_node, yaml.ScalarNode) and key_node.value == key:
            return value
    return None


def is_empty(value: yaml.Node) -> bool:
    """Whether nothing stands behind the key, as in ``expect:``."""
    return bool(value.start_mark.index == value.end_mark.index)


def find_last_leaf(node: yaml.Node) -> yaml.Node:
    """Returns the last scalar or flow collection below ``node``: the parser reports its exact end. As the end of a
    block collection, the parser reports the start of the next token."""
    # As long as it is a collection in block style that is not empty.
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        if isinstance(node, yaml.SequenceNode):
            node = node.value[-1]
            continue
        key, value = node.value[-1]
        node = key if is_empty(value) else value  # an empty value is reported where the next token begins
    return node


def find_line_start(text: str, position: int) -> int:
    """Returns the position at which the line of ``position`` begins."""
    return max(text.rfind("\n", 0, position), text.rfind("\r", 0, position)) + 1


def find_line_end(text: str, position: int) -> int:
    """Returns the position of the line break that ends the line of ``position``, or of the text's end."""
    line_break = _LINE_BREAK.search(text, position)
    return len(text) if line_break is None else line_break.start()


def skip_line_break(text: str, position: int) -> int:
    """Returns the position behind the line break at ``position``; ``position`` itself if there is none."""
    if text.startswith("\r\n", position):
        return position + 2
    return position + 1 if text[position : position + 1] in ("\r", "\n") and position < len(text) else position


def newline_of(text: str) -> str:
    """Returns the line break for new lines: that of the text."""
    return "\r\n" if "\r\n" in text else "\n"
