"""The meaning of the keys of the live table: they select a node, sort the table, and ask for an action on a node.
Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gpumesh.cli.views.node_selection import SortKey, ViewSelection

KEY_HELP = "q quit  ↑↓ node  d drain  r resume  c reconnect  s sort  v processes"
PAGE_ROWS = 10
_STEPS = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -PAGE_ROWS, "page down": PAGE_ROWS}
_ACTIONS = {"d": "drain", "r": "resume", "c": "reconnect"}


@dataclass(slots=True)
class KeySelection:
    """The state that keys change. ``nodes``: the names of the nodes on the screen. ``note``: the response to the last
    key, for the last line of the screen."""

    view: ViewSelection
    selected: str = ""
    note: str = ""
    nodes: Sequence[str] = field(default=())

    def handle_key(self, key: str) -> str | None:
        """Returns the action for the caller: ``quit``; or ``drain``, ``resume`` or ``reconnect`` for the node
        ``selected``; or ``None``."""
        self.note = ""
        if key in _STEPS or key in ("home", "end"):
            self._move_selection(_STEPS.get(key, 0), key)
        elif key == "escape":
            self.selected = ""
        elif key == "s":
            order = list(SortKey)
            sort = order[(order.index(self.view.sort) + 1) % len(order)]
            self.view = replace(self.view, sort=sort)
            self.note = f"sorted by {sort}"
        elif key == "v":
            self.view = replace(self.view, verbose=not self.view.verbose)
        elif key in ("q", "Q"):
            return "quit"
        elif key in _ACTIONS:
            return self._choose_action(key)
        return None

    def _choose_action(self, key: str) -> str | None:
        if not self.selected and len(self.nodes) == 1:
            self.selected = self.nodes[0]
        if not self.selected:
            self.note = "choose a node with ↑ and ↓ first"
            return None
        return _ACTIONS[key]

    def _move_selection(self, step: int, key: str) -> None:
        if not self.nodes:
            return
        last_position = len(self.nodes) - 1
        if key == "home":
            position = 0
        elif key == "end":
            position = last_position
        elif self.selected not in self.nodes:
            position = 0 if step > 0 else last_position
        else:
            position = min(max(self.nodes.index(self.selected) + step, 0), last_position)
        self.selected = self.nodes[position]
