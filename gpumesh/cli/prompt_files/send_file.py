"""Sends the prompts of `run -f FILE`, and writes a JSON line for each result, in the order of the prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import typer

from gpumesh.batches.prompt_lines import PromptEntry
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.open_session import open_session, run_async
from gpumesh.cli.prompt_files.prompt_file import PromptFile, open_prompts
from gpumesh.cli.prompt_files.result_file import ResultFile
from gpumesh.cli.views.progress_bar import ProgressDisplay, show_progress
from gpumesh.cli.views.safe_text import json_text
from gpumesh.daemon.sessions.prompt_sender import default_concurrency, send_with_retries
from gpumesh.daemon.sessions.prompt_window import send_in_window
from gpumesh.daemon.sessions.session import PromptRequest, Session
from gpumesh.errors import ExitCode, UsageError
from gpumesh.event_loop.async_iterators import closing_iterator

WAITING_BYTES = 1 << 24  # so many bytes of results wait behind a slow prompt; then no more prompts are begun
LINES_AT_A_TIME = 256  # so many prompts are skipped before the tasks of the mesh run again


def send_file(
    options: GlobalOptions,
    file: str,
    make_request: Callable[[PromptEntry], PromptRequest],
    out: str | None,
    concurrency: int | None,
    *,
    resume: bool,
) -> None:
    """Sends the prompts of ``file``, at most ``concurrency`` at a time; ``None``: as many as the nodes can take. Writes
    the results to the file ``out``; ``None``: to stdout. With ``resume`` keeps the results that the file has.

    Raises UsageError for a file that cannot be used, before a prompt is sent. Ends the command with exit code 1 if a
    prompt failed."""
    if resume and out is None:
        raise UsageError("--resume needs --out FILE, the file with the results of the run that was stopped")
    with open_prompts(file) as prompts:
        if out is None:
            failed_count = run_async(_send(options, prompts, make_request, None, concurrency))
        else:
            with _open_results(out, prompts, resume=resume, quiet=options.quiet) as results:
                failed_count = 0
                if results.done_count < prompts.count:
                    failed_count = run_async(_send(options, prompts, make_request, results, concurrency))
                else:
                    results.begin()  # removes what no run needs any more
                results.finish()
    if failed_count:
        if not options.quiet:
            message = f"{failed_count} of {prompts.count} prompts failed; `error` in their lines says why"
            typer.echo(message, err=True)
        raise typer.Exit(int(ExitCode.FAILED))


@contextmanager
def _open_results(out: str, prompts: PromptFile, *, resume: bool, quiet: bool) -> Iterator[ResultFile]:
    """Opens the file of results. Unless ``quiet``, tells on stderr what it has already, and what it has when the block
    is left by Ctrl-C or by an error."""
    results = ResultFile(out, prompts, resume=resume)
    done_before = results.done_count
    if not quiet and (done_before or results.failed_count):
        failed_text = f"; failed and sent again: {results.failed_count:,}" if results.failed_count else ""
        typer.echo(f"{out} has {done_before:,} of {prompts.count:,} answers already{failed_text}", err=True)
    try:
        yield results
    except BaseException:
        if not quiet and results.done_count > done_before:
            typer.echo(
                f"{out} has {results.done_count:,} of {prompts.count:,} results; --resume goes on with it", err=True
            )
        raise
    finally:
        results.close()


async def _send(
    options: GlobalOptions,
    prompts: PromptFile,
    make_request: Callable[[PromptEntry], PromptRequest],
    results: ResultFile | None,
    concurrency: int | None,
) -> int:
    """Sends the prompts that have no result yet. ``results``: where to write; ``None``: to stdout. Returns how many
    prompts failed."""
    to_send = prompts.count - (results.done_count if results is not None else 0)
    async with open_session(options) as session:
        nodes = (await session.status()).nodes
        prompts.require_nodes([node.name for node in nodes])
        if concurrency is None:
            concurrency = default_concurrency(len(nodes))
        if results is not None:
            results.begin()
        with show_progress(to_send, "prompts", quiet=options.quiet) as progress:
            sender = _Sender(session, make_request, progress)
            async with asyncio.TaskGroup() as group, closing_iterator(_read_prompts(prompts, results)) as source:
                lines = send_in_window(
                    source,
                    sender.send,
                    group=group,
                    concurrency=concurrency,
                    most_waiting=WAITING_BYTES,
                    weigh=lambda numbered_line: len(numbered_line[1]),
                )
                async with closing_iterator(lines) as closing:
                    async for index, line in closing:
                        if results is None:
                            progress.write(line.decode())
                        else:
                            results.write(index, line)
    return sender.failed_count


async def _read_prompts(prompts: PromptFile, results: ResultFile | None) -> AsyncIterator[tuple[int, PromptEntry]]:
    """The prompts that have no result yet, with their indexes."""
    is_missing = results.is_missing if results is not None else lambda _: True
    for number, numbered_prompt in enumerate(prompts.read(is_missing)):
        if numbered_prompt is not None:
            yield numbered_prompt
        elif number % LINES_AT_A_TIME == 0:
            await asyncio.sleep(0)


class _Sender:
    """Sends prompts, and counts those that have ended on the progress bar."""

    def __init__(
        self, session: Session, make_request: Callable[[PromptEntry], PromptRequest], progress: ProgressDisplay
    ) -> None:
        self.failed_count = 0
        self._ended_count = 0
        self._session = session
        self._make_request = make_request
        self._progress = progress

    async def send(self, numbered_prompt: tuple[int, PromptEntry]) -> tuple[int, bytes]:
        """Sends one prompt. Returns its index, and its result as a JSON line in UTF-8, which takes a quarter of the
        memory of a string that has an emoji. Raises UsageError."""
        index, entry = numbered_prompt
        result = await send_with_retries(self._session, self._make_request(entry), index, entry.text)
        self._ended_count += 1
        self.failed_count += result.error is not None
        self._progress(self._ended_count, f"{self.failed_count} failed" if self.failed_count else "")
        return index, json_text(asdict(result)).encode()
