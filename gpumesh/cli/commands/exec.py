"""`gpumesh exec`: runs a command on a node's host, over the open connection of its tunnel."""

from __future__ import annotations

import asyncio
import codecs
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.open_session import open_session, run_async
from gpumesh.cli.views.safe_text import clean_line, clean_text
from gpumesh.errors import GPUMeshError, UsageError, unknown_node

if TYPE_CHECKING:
    from gpumesh.daemon.sessions.session import Session
    from gpumesh.tunnels.base import ExecChunk, OutputStream

# Bytes that wait for the end of their line, and characters that are printed of a line.
MAX_LINE_LENGTH = 1 << 16

app = new_app()


@app.command("exec", context_settings={"allow_interspersed_args": False})
def exec_(
    ctx: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(metavar="[NODE]... -- CMD...", autocompletion=completion.complete_nodes, show_default=False),
    ],
    everywhere: Annotated[bool, typer.Option("--all", help="On all nodes; each line is prefixed by its node.")] = False,
) -> None:
    """Run a command on a node's host, on several, or on all of them.

    Each word of CMD reaches the host as it is; for pipes and wildcards write: sh -c '…'. The exit code is the
    command's own; with several nodes it is 1 if it failed anywhere. For a shell, and for programs that draw on the
    terminal, there is `gpumesh ssh`.

    \b
    Examples:
      gpumesh exec iceland -- nvidia-smi
      gpumesh exec iceland vengeance -- uptime
      gpumesh exec --all -- df -h /
      gpumesh exec iceland -- sh -c 'du -sh ~/.ollama/models | sort'
    """
    options = global_options(ctx)
    nodes, command = _split_words(words, everywhere=everywhere)
    if not command:
        raise UsageError("which command?", hint="for example: gpumesh exec NODE -- nvidia-smi")
    if len(nodes) == 1:
        exit_code = run_async(_run_on_node(options, nodes[0], command))
    else:
        exit_code = run_async(_run_on_several(options, nodes, command))
    if exit_code != 0:
        raise typer.Exit(exit_code)


def _split_words(words: list[str], *, everywhere: bool) -> tuple[list[str], list[str]]:
    """The nodes, then the command. No nodes: all of them.

    All words before the first ``--`` are nodes. Without ``--`` the first word is the node, as in ssh."""
    if everywhere:
        return [], words[1:] if words[0] == "--" else words
    if "--" not in words:
        return words[:1], words[1:]
    position = words.index("--")
    nodes, command = words[:position], words[position + 1 :]
    if not nodes:
        raise UsageError("on which node?", hint="for example: gpumesh exec NODE -- nvidia-smi, or with --all")
    return list(dict.fromkeys(nodes)), command


async def _run_on_node(options: GlobalOptions, node: str, command: list[str]) -> int:
    """Runs the command on the node's host, and writes its output as it comes: unchanged to a pipe or a file, made safe
    for a terminal. Returns the exit code of `gpumesh exec`. Raises GPUMeshError if the command ends without an exit
    status."""
    from gpumesh.event_loop.async_iterators import closing_iterator
    from gpumesh.tunnels.base import OutputStream

    cleaners = {
        OutputStream.STDOUT: _TerminalCleaner() if sys.stdout.isatty() else None,
        OutputStream.STDERR: _TerminalCleaner() if sys.stderr.isatty() else None,
    }
    status: int | None = None
    async with open_session(options) as session, closing_iterator(session.exec(node, command)) as chunks:
        async for chunk in chunks:
            cleaner = cleaners[chunk.stream]
            data = chunk.data if cleaner is None else cleaner.feed(chunk.data).encode("utf-8", "replace")
            out = sys.stdout if chunk.stream is OutputStream.STDOUT else sys.stderr
            out.buffer.write(data)
            out.buffer.flush()
            if chunk.ended:
                status = chunk.exit_status
    return _exit_code(status, node)


class _TerminalCleaner:
    """Turns the bytes of one stream into safe text for a terminal. A piece may end in the midst of a character."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """The safe text of this piece. The first bytes of a cut character wait for the next piece."""
        return clean_text(self._decoder.decode(data))


def _exit_code(status: int | None, node: str) -> int:
    """The exit code of `gpumesh exec`, from 0 to 255, for the command's exit status. Raises GPUMeshError if the command
    ended without an exit status."""
    if status is None:
        raise GPUMeshError(f"{node}: the command ended without an exit status (killed, or the connection was cut)")
    return min(max(status, 0), 255)  # a host may send any number


async def _run_on_several(options: GlobalOptions, nodes: list[str], command: list[str]) -> int:
    """Runs the command on these nodes at once, or on all nodes if the list is empty. Returns 0 if it succeeded on all
    of them, else 1. Raises UsageError for an unknown node, before anything has run."""
    async with open_session(options) as session:
        state = await session.status()
        known_nodes = [node.name for node in state.nodes]
        for name in nodes:
            if name not in known_nodes:
                raise unknown_node(name, known_nodes)
        nodes = nodes or known_nodes
        width = max(map(len, nodes), default=0)
        exit_codes = await asyncio.gather(*(_run_with_prefix(session, node, command, width) for node in nodes))
    return 0 if all(code == 0 for code in exit_codes) else 1


async def _run_with_prefix(session: Session, node: str, command: list[str], width: int) -> int:
    """Runs the command on one node, and prints its output after the node's name, which is padded to ``width``
    characters. Returns its exit code; 1 if the command could not be run, or ended without an exit status."""
    from gpumesh.event_loop.async_iterators import closing_iterator

    printer = _PrefixPrinter(f"{node:<{width}}")
    try:
        status: int | None = None
        async with closing_iterator(session.exec(node, command)) as chunks:
            async for chunk in chunks:
                printer.feed(chunk)
                if chunk.ended:
                    status = chunk.exit_status
        printer.finish()
        code = _exit_code(status, node)
    except GPUMeshError as error:
        typer.echo(f"{node:<{width}}  error: {clean_line(error.message)}", err=True)
        if error.hint:
            typer.echo(f"{node:<{width}}  hint: {clean_line(error.hint)}", err=True)
        return 1
    if code:
        typer.echo(f"{node:<{width}}  exit status {code}", err=True)
    return code


class _PrefixPrinter:
    """Prints the output of one node in whole lines, each after the prefix, so that no line has output of two nodes. A
    line that is longer than MAX_LINE_LENGTH is printed in parts."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._unended_lines: dict[OutputStream, bytes] = {}  # what has come of the last line of each stream

    def feed(self, chunk: ExecChunk) -> None:
        """Prints the lines that end in this piece of output. The rest waits for the next piece of the same stream."""
        stream = chunk.stream
        data = self._unended_lines.get(stream, b"") + chunk.data
        *lines, unended_line = data.split(b"\n")
        if len(unended_line) > MAX_LINE_LENGTH:
            lines.append(unended_line)
            unended_line = b""
        self._unended_lines[stream] = unended_line
        for line in lines:
            self._print(stream, line)

    def finish(self) -> None:
        """Prints the last lines, which had no line feed at their end."""
        for stream, line in self._unended_lines.items():
            if line:
                self._print(stream, line)

    def _print(self, stream: OutputStream, line: bytes) -> None:
        """Prints one line to stdout or stderr, where the command wrote it."""
        text = f"{self._prefix}  {clean_line(line.decode('utf-8', 'replace'), MAX_LINE_LENGTH)}"
        typer.echo(text.rstrip(), err=stream.value == "stderr")
