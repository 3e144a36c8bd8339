"""What the keys of the live table mean: which node is selected, how the table is sorted, what is done to a node.
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
    """The state that keys change. ``nodes`` are those on the screen; ``note`` answers the last key."""

    view: ViewSelection
    selected: str = ""
    note: str = ""
    nodes: Sequence[str] = field(default=())

    def handle_key(self, key: str) -> str | None:
        """What the caller is to do: ``quit``; or ``drain``, ``resume``, ``reconnect`` for ``selected``; or nothing."""
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
        last = len(self.nodes) - 1
        if key == "home" or (self.selected not in self.nodes and step >= 0 and key != "end"):
            position = 0
        elif key == "end" or self.selected not in self.nodes:
            position = last
        else:
            position = min(max(self.nodes.index(self.selected) + step, 0), last)
        self.selected = self.nodes[position]
