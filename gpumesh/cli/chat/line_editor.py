"""``LineEditor``: reads messages at the terminal with prompt_toolkit, in the event loop and without threads.

The terminal stays in raw mode for the whole chat, so that keys pressed during an answer are not echoed into it. They
are kept for the next line, and Ctrl-C among them stops the answer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import Completer
from prompt_toolkit.data_structures import Size
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.history import History
from prompt_toolkit.input import create_input
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.styles import Style

from gpumesh.cli.chat import history_file
from gpumesh.cli.chat.message_text import is_open
from gpumesh.config import environment

PROMPT, CONTINUATION = ">>> ", "... "
PLACEHOLDER = "Send a message (/? for help)"
_STYLE = Style.from_dict({"placeholder": "ansibrightblack", "bottom-toolbar": "noreverse"})


class LineInterrupted(Exception):
    """Ctrl-C was pressed while a line was typed. ``was_empty``: nothing had been typed."""

    def __init__(self) -> None:
        super().__init__()
        self.was_empty = False


class LineEditor:
    """A line editor with a history in the file ``history_path``; ``None``: the history is not kept."""

    def __init__(self, history_path: Path | None, completer: Completer) -> None:
        self._input = create_input(sys.stdin)
        self._output = _make_output()
        self.history = _FileHistory(history_path)
        self._session: PromptSession[str] = PromptSession(
            history=self.history,
            completer=completer,
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            key_bindings=_make_key_bindings(),
            multiline=True,
            prompt_continuation=CONTINUATION,
            enable_suspend=True,
            style=_STYLE,
            input=self._input,
            output=self._output,
            interrupt_exception=LineInterrupted,
        )

    @contextmanager
    def raw_terminal(self) -> Iterator[None]:
        """The block in which the editor may be used. Its end restores the terminal."""
        with self._input.raw_mode():
            yield

    async def read(self, default: str = "") -> str:
        """Reads a message of one or several lines. ``default`` stands there already. Raises LineInterrupted for Ctrl-C,
        and EOFError for Ctrl-D where nothing is typed."""
        try:
            return await self._session.prompt_async(
                PROMPT, default=default, placeholder=_placeholder, set_exception_handler=False
            )
        except LineInterrupted as interrupted:
            interrupted.was_empty = not self._session.default_buffer.text
            raise

    async def confirm(self, question: str) -> bool:
        """Whether the person answers the question with yes."""
        asking: PromptSession[str] = PromptSession(
            input=self._input, output=self._output, interrupt_exception=LineInterrupted
        )
        try:
            answer = await asking.prompt_async(f"{question} [y/N] ")
        except (LineInterrupted, EOFError):
            return False
        return answer.strip().lower() in ("y", "yes")

    @contextmanager
    def answering(self, on_interrupt: Callable[[], None]) -> Iterator[None]:
        """The block in which an answer is printed. Ctrl-C calls ``on_interrupt``; all other keys are kept for the next
        line. So is a paste, which stays one text."""
        kept: list[KeyPress] = []

        def take(keys: Iterable[KeyPress]) -> None:
            for press in keys:
                if press.key == Keys.ControlC:
                    kept.clear()  # as the terminal itself drops its input at Ctrl-C
                    on_interrupt()
                elif press.key != Keys.ControlZ:
                    kept.append(press)

        def read_keys() -> None:
            take(self._input.read_keys())
            if self._input.closed:
                on_interrupt()

        self._output.enable_bracketed_paste()
        self._output.flush()
        try:
            with self._input.attach(read_keys):
                yield
        finally:
            take(self._input.flush_keys())
            store_typeahead(self._input, kept)
            self._output.disable_bracketed_paste()
            self._output.flush()


class _FileHistory(History):
    """The history of the editor. ``is_kept``: new entries are written to the file."""

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path
        self.is_kept = True

    def load_history_strings(self) -> Iterable[str]:
        return [] if self._path is None else reversed(history_file.read_entries(self._path))

    def store_string(self, string: str) -> None:
        if self._path is not None and self.is_kept:
            history_file.add_entry(self._path, string)


def _placeholder() -> AnyFormattedText:
    """What stands in an empty line. It goes when the line has ended, and is not shown where it could not be told from
    what was typed."""
    return [] if get_app().is_done or environment.no_color() else [("class:placeholder", PLACEHOLDER)]


def _make_output() -> Output:
    """The output of the editor: the terminal, with a usual size if its own is not known."""
    if sys.platform == "win32":
        return create_output(sys.stdout)

    def size() -> Size:
        try:
            terminal = os.get_terminal_size(sys.stdout.fileno())
        except OSError:  # the terminal has gone
            return Size(24, 80)
        # A terminal that does not know its size says 0.
        return Size(terminal.lines or 24, terminal.columns or 80)

    # Without questions for the position of the cursor: their answers could come after the chat has ended, into the
    # shell.
    return Vt100_Output(sys.stdout, size, term=environment.get("TERM"), enable_cpr=False)


def _make_key_bindings() -> KeyBindings:
    """Enter sends the message, or begins a new line in a text that is still open. Escape and Enter begins a new
    line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
