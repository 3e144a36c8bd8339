"""The live table of `status --watch`, and of `up` on a terminal. Keys select a node and start an action on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from rich.text import Text

from gpumesh.cli.views.console import console, render_lines
from gpumesh.cli.views.figures import shorten
from gpumesh.cli.views.live.key_selection import KEY_HELP, KeySelection
from gpumesh.cli.views.live.node_actions import NodeActions
from gpumesh.cli.views.live.note import Note
from gpumesh.cli.views.live.screen import Screen
from gpumesh.cli.views.node_selection import ViewSelection
from gpumesh.cli.views.status.status_view import ViewOptions, status_view
from gpumesh.daemon.sessions.session import Session
from gpumesh.errors import GPUMeshError
from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.mesh.history import History, Recorder
from gpumesh.state import MeshState

MIN_REDRAW_S = 0.05  # between two redraws, however fast a key repeats
MIN_ROWS = 8  # of the table; the text below it gets the other lines of the screen


class LiveTable:
    """Redraws the table when the state changes or a key is pressed.

    ``footer`` is the last line of the screen when no keys are read. ``notes`` stand below the table if the screen has
    room for them. ``quit_question`` is asked after ``q``; without it, ``q`` leaves at once."""

    def __init__(
        self,
        session: Session,
        view: ViewSelection,
        *,
        footer: str,
        notes: Sequence[str] = (),
        quit_question: str = "",
    ) -> None:
        self._session = session
        self._selection = KeySelection(view, quit_question=quit_question)
        self._footer = footer
        self._notes_below = notes
        self._out = console()
        self._state: MeshState | None = None
        self._recorder = Recorder()
        self._redraw = asyncio.Event()
        self._note = Note(self._redraw.set)
        self._actions = NodeActions(session, self._note.show)
        self._quit = False

    def __repr__(self) -> str:
        nodes = 0 if self._state is None else len(self._state.nodes)
        phase = "WAITING" if self._state is None else "SHOWN"
        if self._quit:
            phase = "QUIT"
        return f"<LiveTable {phase} {nodes} nodes selected {self._selection.selected!r}>"

    async def run(self, states: AsyncIterator[MeshState]) -> MeshState | None:
        """Shows the table until ``q`` is pressed or ``states`` ends. Returns the last state; ``None`` if there was
        none. Raises the errors of ``states``, and UsageError when the view selects no node."""
        follow_task = asyncio.create_task(self._follow(states), name="states")
        follow_task.add_done_callback(lambda _: self._redraw.set())
        try:
            with Screen(self._out.file, on_key=self._handle_key, on_change=self._redraw.set) as screen:  # type: ignore[arg-type]
                await self._redraw_until_end(screen, follow_task)
        finally:
            follow_task.cancel()
            [follow_result] = await asyncio.gather(follow_task, return_exceptions=True)  # waits for its end
            await self._actions.close()
            self._note.close()
        if isinstance(follow_result, Exception):  # not CancelledError, which is no Exception
            raise follow_result
        return self._state

    async def _redraw_until_end(self, screen: Screen, follow_task: asyncio.Task[None]) -> None:
        """Draws the screen each time when ``_redraw`` is set, until ``q`` is pressed or ``follow_task`` ends."""
        while not self._quit:
            await self._redraw.wait()
            self._redraw.clear()
            if self._state is not None:
                screen.draw(self._lines(self._state, reads_keys=screen.reads_keys))
            if follow_task.done():
                return
            await asyncio.sleep(MIN_REDRAW_S)

    async def _follow(self, states: AsyncIterator[MeshState]) -> None:
        """Takes each new state for the table, until ``states`` ends. The history of the table begins with the history
        of the mesh, if the mesh has one. Raises UsageError when the view selects no node."""
        mesh_history = await self._fetch_history()
        async with closing_iterator(states):
            async for state in states:
                self._selection.view.apply(state)  # only for its UsageError: ``_lines`` applies the view again
                if self._state is None:  # the first state tells the time at which the mesh's history ends
                    self._recorder = Recorder(mesh_history, at=state.at)
                self._state = state
                self._recorder.add(state)
                self._redraw.set()

    async def _fetch_history(self) -> History:
        """The history that the mesh keeps of the last minute; empty if the mesh is of an older version and has none."""
        try:
            return await self._session.history()
        except GPUMeshError:  # a mesh of an older version answers with an error
            return History()

    def _lines(self, state: MeshState, *, reads_keys: bool) -> list[str]:
        """All lines of the screen: the table, the notes below, and the last line."""
        size = self._out.size
        shown_state = self._selection.view.apply(state)
        self._selection.nodes = [node.name for node in shown_state.nodes]
        note_lines: list[str] = []
        for note in self._notes_below:
            # Notes are folded and not shortened, because a path that ends in "…" could not be copied.
            note_lines += render_lines(self._out, Text(note, overflow="fold"))
        height = size.height - 1  # without the last line
        note_lines = note_lines[: max(height - MIN_ROWS, 0)]
        table_height = height - len(note_lines)
        options = ViewOptions(
            verbose=self._selection.view.verbose,
            height=table_height,
            selected=self._selection.selected or None,
            history=self._recorder.history(),
        )
        # A very small screen has no room even for the smallest table: then the table is cut.
        table_lines = render_lines(self._out, status_view(shown_state, size.width, options))[:table_height]
        default_last_line = KEY_HELP if reads_keys else self._footer
        if self._selection.asks:  # the question stays until a key answers it
            last_line, style = self._selection.quit_question, "bold"
        else:
            last_line, style = self._note.text or default_last_line, "dim"
        last_text = Text(shorten(last_line, size.width), style=style, no_wrap=True)
        return [*table_lines, *note_lines, *render_lines(self._out, last_text)]

    def _handle_key(self, key: str) -> None:
        """Changes the selection or starts an action. The note makes the screen redraw."""
        action = self._selection.handle_key(key)
        if action == "quit":
            self._quit = True
        elif action is not None:
            self._actions.start(action, self._selection.selected)
        self._note.show(self._selection.note)
