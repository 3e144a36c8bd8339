"""Handles the keys of the live table: they select a node, sort the table, and ask for an action on a node. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gpumesh.cli.views.node_selection import SortKey, ViewSelection

KEY_HELP = "q quit  ↑↓ node  d drain  r resume  c reconnect  s sort  v processes"
PAGE_NODES = 10  # by so many nodes a page key moves the selection
# By key: the number of nodes by which the selection moves.
_STEPS = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -PAGE_NODES, "page down": PAGE_NODES}
_ACTIONS = {"d": "drain", "r": "resume", "c": "reconnect"}


@dataclass(slots=True)
class KeySelection:
    """The state that keys change.

    - ``selected``: the name of the selected node; empty if no node is selected.
    - ``note``: the response to the last key, for the last line of the screen.
    - ``nodes``: the names of the nodes on the screen, in their order.
    - ``quit_question``: what to ask before ``quit``, because it ends more than the view; empty if nothing is asked.
    - ``asks``: the question is on the screen, and the next key is its answer.
    """

    view: ViewSelection
    selected: str = ""
    note: str = ""
    nodes: Sequence[str] = field(default=())
    quit_question: str = ""
    asks: bool = False

    def handle_key(self, key: str) -> str | None:
        """Changes the state. Returns the action that the caller must perform: ``quit``; or ``drain``, ``resume`` or
        ``reconnect`` for the node ``selected``; or ``None`` for no action."""
        self.note = ""
        if self.asks:
            self.asks = False
            return "quit" if key in ("y", "Y") else None
        if key in _STEPS or key in ("home", "end"):
            self._move_selection(key)
        elif key == "escape":
            self.selected = ""
        elif key == "s":
            sort_keys = list(SortKey)
            next_index = (sort_keys.index(self.view.sort) + 1) % len(sort_keys)
            sort_key = sort_keys[next_index]
            self.view = replace(self.view, sort=sort_key)
            self.note = f"sorted by {sort_key}"
        elif key == "v":
            self.view = replace(self.view, verbose=not self.view.verbose)
        elif key in ("q", "Q"):
            self.asks = bool(self.quit_question)
            return None if self.asks else "quit"
        elif key in _ACTIONS:
            return self._choose_action(key)
        return None

    def _choose_action(self, key: str) -> str | None:
        """Returns the action of the key; ``None`` if no node is selected. If there is only one node, selects it
        first."""
        if not self.selected and len(self.nodes) == 1:
            self.selected = self.nodes[0]
        if not self.selected:
            self.note = "choose a node with ↑ and ↓ first"
            return None
        return _ACTIONS[key]

    def _move_selection(self, key: str) -> None:
        """Selects the node to which the key moves; does nothing if there is no node. If no node is selected, or the
        selected node is gone, a key that moves down selects the first node, and a key that moves up the last."""
        if not self.nodes:
            return
        last_position = len(self.nodes) - 1
        if key == "home":
            position = 0
        elif key == "end":
            position = last_position
        elif self.selected not in self.nodes:
            position = 0 if _STEPS[key] > 0 else last_position
        else:
            position = self.nodes.index(self.selected) + _STEPS[key]
            position = min(max(position, 0), last_position)
        self.selected = self.nodes[position]
