"""The table that stays: `status --watch`, and `up` on a terminal. Keys choose a node and do something to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.text import Text

from gpumesh.cli.text import clean_line, shorten
from gpumesh.cli.views.node_selection import SortKey, select_nodes, sort_nodes
from gpumesh.cli.views.status_table import ViewOptions, status_view
from gpumesh.cli.views.tables import console, render_lines
from gpumesh.cli.views.terminal import Screen
from gpumesh.daemon.async_generators import closing_iterator
from gpumesh.daemon.session import Session
from gpumesh.errors import GPUMeshError
from gpumesh.mesh.history import History, Recorder
from gpumesh.state import MeshState

KEY_HELP = "q quit  ↑↓ node  d drain  r resume  c reconnect  s sort  v processes"
NOTE_SHOWN_S = 4.0
MIN_REDRAW_S = 0.05  # between two redraws, however fast a key repeats
PAGE_ROWS = 10
MIN_ROWS = 8  # of the table; what stands below it has the rest


@dataclass(frozen=True, slots=True)
class ViewSelection:
    """What is shown of the mesh."""

    names: Sequence[str] = ()
    labels: Sequence[str] = ()
    sort: SortKey = SortKey.CONFIG
    verbose: bool = False

    def apply(self, state: MeshState) -> MeshState:
        """Raises UsageError when that is nothing."""
        return sort_nodes(select_nodes(state, self.names, self.labels), self.sort)


@dataclass(slots=True)
class KeySelection:
    """What the keys have chosen. Pure: ``handle_key`` says what else is to be done, and to which node."""

    view: ViewSelection
    selected: str = ""
    note: str = ""
    nodes: Sequence[str] = field(default=())

    def handle_key(self, key: str) -> str | None:
        """``quit``, ``drain``, ``resume`` or ``reconnect`` (of ``selected``), or ``None``."""
        self.note = ""
        moves = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -PAGE_ROWS, "page down": PAGE_ROWS}
        if key in moves or key in ("home", "end"):
            self._move(moves.get(key, 0), key)
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
        elif key in ("d", "r", "c"):
            if not self.selected and len(self.nodes) == 1:
                self.selected = self.nodes[0]
            if not self.selected:
                self.note = "choose a node with ↑ and ↓ first"
                return None
            return {"d": "drain", "r": "resume", "c": "reconnect"}[key]
        return None

    def _move(self, by: int, key: str) -> None:
        if not self.nodes:
            return
        last = len(self.nodes) - 1
        if key == "home" or (self.selected not in self.nodes and by >= 0 and key != "end"):
            place = 0
        elif key == "end" or self.selected not in self.nodes:
            place = last
        else:
            place = min(max(self.nodes.index(self.selected) + by, 0), last)
        self.selected = self.nodes[place]


class LiveTable:
    """``footer`` is shown while there are no keys to be read, ``below`` under the table where the screen has room."""

    def __init__(self, session: Session, view: ViewSelection, *, footer: str, notes: Sequence[str] = ()) -> None:
        self._session = session
        self._choice = KeySelection(view)
        self._footer = footer
        self._below = notes
        self._out = console()
        self._state: MeshState | None = None
        self._recorder = Recorder()
        self._wake = asyncio.Event()
        self._quit = False
        self._doing: set[asyncio.Task[None]] = set()
        self._forget: asyncio.TimerHandle | None = None

    async def run(self, states: AsyncIterator[MeshState]) -> MeshState | None:
        """Until ``q`` or the end of ``states``; the last state. Raises what ``states`` raises, and UsageError for what
        is wrong with ``wanted``."""
        following = asyncio.create_task(self._follow(states), name="states")
        following.add_done_callback(lambda _: self._wake.set())
        try:
            with Screen(self._out.file, on_key=self._press, on_change=self._wake.set) as screen:  # type: ignore[arg-type]
                while not self._quit:
                    await self._wake.wait()
                    self._wake.clear()
                    if self._state is not None:
                        screen.draw(self._lines(self._state, keys=screen.reads_keys))
                    if following.done():
                        break
                    await asyncio.sleep(MIN_REDRAW_S)
        finally:
            for task in (following, *self._doing):
                task.cancel()
            results = await asyncio.gather(following, return_exceptions=True)
            if self._forget is not None:
                self._forget.cancel()
        if isinstance(results[0], Exception):
            raise results[0]
        return self._state

    async def _follow(self, states: AsyncIterator[MeshState]) -> None:
        earlier: History | None = await self._past()
        async with closing_iterator(states):
            async for state in states:
                self._choice.view.apply(state)  # what is wrong with it is said at once
                if earlier is not None:
                    self._recorder, earlier = Recorder(earlier, at=state.at), None
                self._state = state
                self._recorder.add(state)
                self._wake.set()

    async def _past(self) -> History:
        try:
            return await self._session.history()
        except GPUMeshError:
            return History()  # a mesh of an older version keeps none

    def _lines(self, state: MeshState, *, keys: bool) -> list[str]:
        size = self._out.size
        shown = self._choice.view.apply(state)
        self._choice.nodes = [node.name for node in shown.nodes]
        selected = self._choice.selected or None
        # Folded, not shortened: a path that ends in "…" could not be copied.
        below = [line for text in self._below for line in render_lines(self._out, Text(text, overflow="fold"))]
        below = below[: max(size.height - 1 - MIN_ROWS, 0)]
        rows = size.height - 1 - len(below)
        look = ViewOptions(self._choice.view.verbose, rows, selected, self._recorder.history())
        body = render_lines(self._out, status_view(shown, size.width, look))[:rows]
        said = self._choice.note or (KEY_HELP if keys else self._footer)
        return [*body, *below, *render_lines(self._out, Text(shorten(said, size.width), style="dim", no_wrap=True))]

    # -- keys ----------------------------------------------------------------------------------------------------

    def _press(self, key: str) -> None:
        what = self._choice.handle_key(key)
        node = self._choice.selected
        if what == "quit":
            self._quit = True
        elif what is not None:
            calls: dict[str, Callable[[str], Coroutine[Any, Any, None]]] = {
                "drain": self._session.drain,
                "resume": self._session.resume,
                "reconnect": self._session.reconnect,
            }
            task = asyncio.create_task(self._do(calls[what](node), f"{what} {node}"), name=what)
            self._doing.add(task)
            task.add_done_callback(self._doing.discard)
        self._noted()

    async def _do(self, call: Coroutine[Any, Any, None], words: str) -> None:
        try:
            await call
            self._choice.note = words
        except GPUMeshError as error:
            self._choice.note = clean_line(f"{words}: {error.message}")
        self._noted()

    def _noted(self) -> None:
        """A note stays for a while."""
        if self._forget is not None:
            self._forget.cancel()
        self._forget = asyncio.get_running_loop().call_later(NOTE_SHOWN_S, self._silent)
        self._wake.set()

    def _silent(self) -> None:
        self._choice.note = ""
        self._wake.set()
