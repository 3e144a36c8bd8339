"""``AnswerPrinter``: prints one answer while it comes, and measures it."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass, field

from prompt_toolkit.utils import get_cwidth

from gpumesh.backends.base import Chunk
from gpumesh.cli.chat.answer_painter import DIM, RESET, AnswerPainter
from gpumesh.cli.views.safe_text import clean_text
from gpumesh.config import environment
from gpumesh.daemon.sessions.session import PromptRequest, Session
from gpumesh.errors import GPUMeshError

WAITING_AFTER_S = 1.0  # an answer that has not begun by then shows for how long it is awaited
_ERASE_LINE = "\r\x1b[K"


@dataclass(slots=True)
class AnswerSummary:
    """What is known of an answer. ``nodes`` have answered, one after the other. ``error``: why there is no answer, or
    no whole answer. ``ttft_ms`` is measured here; ``tokens`` and ``tokens_per_s`` are the server's own figures."""

    text: str = ""
    nodes: list[str] = field(default_factory=list)
    tokens: int | None = None
    tokens_per_s: float | None = None
    ttft_ms: float | None = None
    done_reason: str | None = None
    error: GPUMeshError | None = None


class AnswerPrinter:
    """Prints to stdout. ``summary`` is up to date while the answer comes. ``is_plain``: without colours."""

    def __init__(self, session: Session, *, is_plain: bool) -> None:
        self.summary = AnswerSummary()
        self._session = session
        self._is_plain = is_plain
        self._began = time.perf_counter()
        self._is_waiting_shown = False  # a line says that the answer is awaited
        self._text_painter = AnswerPainter(terminal_columns, get_cwidth, is_plain=is_plain)
        self._thinking_painter: AnswerPainter | None = None  # while the model thinks

    async def print_answer(self, request: PromptRequest) -> None:
        """Sends the request, and prints its answer to the end. A GPUMeshError becomes a part of the summary. Cancelling
        stops the answer on its node."""
        pieces: list[str] = []
        summary = self.summary
        try:
            async with self._session.chat(request) as stream:
                async for chunk in stream:
                    if stream.node is not None and stream.node not in summary.nodes[-1:]:
                        summary.nodes.append(stream.node)
                    pieces.append(chunk.text)
                    self._print_chunk(chunk)
        except GPUMeshError as error:
            summary.error = error
        finally:
            summary.text = "".join(pieces)

    async def show_waiting(self) -> None:
        """Shows for how long the answer is awaited, until it begins."""
        if environment.dumb_terminal():
            return
        await asyncio.sleep(WAITING_AFTER_S)
        while self.summary.ttft_ms is None:
            text = f"waiting for the answer, {time.perf_counter() - self._began:.0f} s"
            self._write(f"{_ERASE_LINE}{text}" if self._is_plain else f"{_ERASE_LINE}{DIM}{text}{RESET}")
            self._is_waiting_shown = True
            await asyncio.sleep(1.0)

    def end(self) -> None:
        """Ends the last line of the answer."""
        self._hide_waiting()
        self._write(self._end_thinking() + self._text_painter.end())

    def _print_chunk(self, chunk: Chunk) -> None:
        """Prints the text of the chunk, and keeps its figures for the summary."""
        summary = self.summary
        if (chunk.text or chunk.thinking) and summary.ttft_ms is None:
            summary.ttft_ms = (time.perf_counter() - self._began) * 1000
            self._hide_waiting()
        if chunk.thinking:
            self._write(self._begin_thinking().feed(clean_text(chunk.thinking)))
        if chunk.text:
            self._write(self._end_thinking() + self._text_painter.feed(clean_text(chunk.text)))
        if chunk.done:
            summary.done_reason = chunk.done_reason
        if chunk.counters is not None:
            summary.tokens, summary.tokens_per_s = chunk.counters.tokens, chunk.counters.tokens_per_s

    def _begin_thinking(self) -> AnswerPainter:
        if self._thinking_painter is None:
            self._thinking_painter = AnswerPainter(terminal_columns, get_cwidth, is_plain=self._is_plain, base=DIM)
            self._write(self._text_painter.end() + self._thinking_painter.feed("thinking …\n"))
        return self._thinking_painter

    def _end_thinking(self) -> str:
        """The end of the thoughts, if the model was thinking, and an empty line."""
        painter, self._thinking_painter = self._thinking_painter, None
        return "" if painter is None else painter.end() + painter.feed("… done\n\n")

    def _hide_waiting(self) -> None:
        if self._is_waiting_shown:
            self._is_waiting_shown = False
            self._write(_ERASE_LINE)

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()


def terminal_columns() -> int:
    """The width of the terminal now."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80  # 0: the terminal does not know its width
    except OSError:  # the terminal has gone
        return 80


def colours_are_off() -> bool:
    """Whether the terminal, or the person, wants no colours."""
    return environment.no_color() or environment.dumb_terminal()
