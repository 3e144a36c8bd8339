"""``run_chat``: reads messages at the terminal, sends each through the mesh, and prints the answers as they come."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from typing import Any

from gpumesh.cli.chat.answer_painter import DIM, RESET
from gpumesh.cli.chat.answer_printer import AnswerPrinter, AnswerSummary, colours_are_off, terminal_columns
from gpumesh.cli.chat.chat_fleet import ChatFleet
from gpumesh.cli.chat.completer import ChatCompleter
from gpumesh.cli.chat.conversation import Conversation
from gpumesh.cli.chat.line_editor import LineEditor, LineInterrupted
from gpumesh.cli.chat.message_text import split_command, unquote
from gpumesh.cli.chat.slash_commands import SlashCommands
from gpumesh.cli.error_exit import print_error
from gpumesh.cli.fleet_models import FleetModels, find_models
from gpumesh.cli.views.safe_text import clean_line, clean_text
from gpumesh.config import environment
from gpumesh.daemon.sessions.session import PromptRequest, Session
from gpumesh.errors import GPUMeshError, NoNodeError, UsageError
from gpumesh.mesh.models.default_model import is_embedding_model
from gpumesh.state import MeshState
from gpumesh.topology import Topology

HISTORY_FILE = "chat_history"  # in the state folder


def require_terminal() -> None:
    """Raises UsageError unless a person can type and read here."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "chat needs a terminal to type at and to read from",
            hint='a single prompt is sent by: gpumesh run "Why is the sky blue?"',
        )


async def run_chat(
    session: Session, topology: Topology, common: PromptRequest, system: str | None, *, quiet: bool = False
) -> None:
    """Talks with a model until the person ends it. ``common`` has the model, the node and the options at the beginning.
    ``quiet``: no remarks at the beginning, and no line after each answer. Raises ModelMissing for a model that no node
    has, and NoNodeError if none can be chosen."""
    models = await find_models(session, topology, common.model)
    state = await session.status()
    _require_node(common.node, state)
    model = common.model or topology.gateway.default_model
    if model is None:
        model = _choose_model(state, models)
    elif models.is_missing(model):
        raise models.missing_error(model)
    conversation = Conversation(models.find(model) or model, common.node, system, dict(common.options))
    fleet = ChatFleet(session, topology, models, state)
    chat = _Chat(session, fleet, conversation)
    chat.commands.is_verbose = not quiet
    with chat.editor.raw_terminal():
        if not quiet:
            chat.say(f"{clean_line(conversation.model)} · /help lists commands, Ctrl-D ends")
        await chat.run()


def _require_node(node: str | None, state: MeshState) -> None:
    names = [node_state.name for node_state in state.nodes]
    if node is not None and node not in names:
        raise UsageError(f"there is no node {node!r}", hint=f"the nodes are: {', '.join(names)}")


def _choose_model(state: MeshState, models: FleetModels) -> str:
    """The model for a chat without a choice: one that is in memory, else the first. Raises NoNodeError if there is
    none."""
    for node in state.nodes:
        for loaded in node.backend.loaded:
            if loaded.name in models.usable and not is_embedding_model(loaded.name, None):
                return loaded.name
    if not models.usable:
        raise NoNodeError(
            "no node that is up has a model to chat with",
            hint="`gpumesh status` shows each node; `gpumesh models pull NAME` fetches a model, e.g. qwen2.5:7b",
        )
    return models.usable[0]


class _Chat:
    """One chat, from its first line to its last."""

    def __init__(self, session: Session, fleet: ChatFleet, conversation: Conversation) -> None:
        self._session = session
        self._fleet = fleet
        self._conversation = conversation
        self._is_plain = colours_are_off()
        self.commands = SlashCommands(
            conversation, fleet, say=self.say, confirm=self._confirm, keep_history=self._keep_history
        )
        self.editor = LineEditor(environment.state_dir() / HISTORY_FILE, ChatCompleter(self.commands))

    def say(self, text: str) -> None:
        """Prints a remark, apart from what models say."""
        text = "\n".join(map(_wrap_line, clean_text(text).split("\n")))
        sys.stdout.write(f"{text}\n" if self._is_plain else f"{DIM}{text}{RESET}\n")
        sys.stdout.flush()

    async def _confirm(self, question: str) -> bool:
        return await self.editor.confirm(question)

    def _keep_history(self, is_kept: bool) -> None:
        self.editor.history.is_kept = is_kept

    async def run(self) -> None:
        """Reads and obeys lines until the chat ends."""
        unsent_text = ""  # a message that could not be answered stands in the next line
        interrupts = 0  # on an empty line, one after the other
        while not self.commands.is_ended:
            try:
                line = await self.editor.read(unsent_text)
            except LineInterrupted as interrupted:
                interrupts = interrupts + 1 if interrupted.was_empty else 0
                unsent_text = ""
                if interrupts >= 2:
                    return
                if interrupted.was_empty:
                    self.say("Ctrl-C once more, Ctrl-D or /bye ends the chat")
                continue
            except EOFError:
                return
            interrupts, unsent_text = 0, ""
            try:
                command = split_command(line)
                if command is not None:
                    await self.commands.run(*command)
                elif text := unquote(line):
                    unsent_text = line
                    await self._send(text)
                    unsent_text = ""
            except GPUMeshError as error:
                print_error(error)

    async def _send(self, text: str) -> None:
        """Sends a message and prints the answer. Raises GPUMeshError; then the conversation is as before."""
        printer = AnswerPrinter(self._session, is_plain=self._is_plain)
        request = self._conversation.make_request(text)
        try:
            async with asyncio.TaskGroup() as group:
                answer = group.create_task(printer.print_answer(request))
                waiting = group.create_task(printer.show_waiting())
                with self.editor.answering(lambda: _cancel_once(answer)):
                    await asyncio.wait([answer])
                waiting.cancel()
        finally:
            printer.end()  # what follows gets a line of its own, also the shell's prompt after a signal
        summary = printer.summary
        if summary.error is not None:
            raise summary.error
        if summary.text:
            self._conversation.add_exchange(text, summary.text)
        if self.commands.is_verbose:
            self.say(describe_answer(summary, is_stopped=answer.cancelled()))
        await self._fleet.refresh()


def _cancel_once(task: asyncio.Task[Any]) -> None:
    """Cancels the task, unless it is being cancelled: a second Ctrl-C must not disturb the end of the first."""
    if not task.cancelling():
        task.cancel()


def describe_answer(summary: AnswerSummary, *, is_stopped: bool) -> str:
    """A line that says which node answered, and how fast."""
    parts = [" then ".join(summary.nodes)] if summary.nodes else []
    if summary.tokens is not None:
        parts.append(f"{summary.tokens} token{'' if summary.tokens == 1 else 's'}")
    if summary.tokens_per_s is not None:
        parts.append(f"{summary.tokens_per_s:.1f} tokens/s")
    if summary.ttft_ms is not None:
        parts.append(f"first token after {_duration(summary.ttft_ms)}")
    if summary.done_reason == "length":
        parts.append("reached the length limit")
    if is_stopped:
        parts.append("stopped")
    return " · ".join(parts)


def _wrap_line(line: str) -> str:
    """The line, broken at blanks where it does not fit into the terminal. A line that fits keeps all its blanks."""
    columns = terminal_columns() - 1
    if len(line) <= columns:
        return line
    return "\n".join(textwrap.wrap(line, columns, break_long_words=False, break_on_hyphens=False))


def _duration(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"
