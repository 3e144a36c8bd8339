"""`gpumesh run`: prompts through the balancer."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.context import GlobalOptions, global_options, open_session, run_async
from gpumesh.cli.lazy import new_app
from gpumesh.cli.text import clean_text, json_text
from gpumesh.errors import ExitCode, GPUMeshError, QueueFull, StreamCut, UsageError

if TYPE_CHECKING:
    from gpumesh.balancer.base import Priority
    from gpumesh.daemon.session import PromptRequest, Session

PROMPTS_PER_NODE = 8  # prompts under way for each node: enough to keep one that runs several at a time busy
MAX_CONCURRENT_PROMPTS = 256
MAX_CUT_ANSWERS = 4

app = new_app()


@dataclass(frozen=True, slots=True)
class PromptResult:
    """What became of one prompt. ``ttft_ms`` and ``total_ms`` are as seen here, queueing and tunnel included;
    ``tokens`` and ``tokens_per_s`` are the server's own."""

    index: int
    prompt: str
    response: str | None
    node: str | None = None
    attempts: int = 0
    ttft_ms: float | None = None
    total_ms: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    error: str | None = None


@app.command()
def run(
    ctx: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; - or nothing reads stdin.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Else the default model.", autocompletion=completion.complete_models
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", metavar="FILE", help="Many prompts: a line each, or JSON lines.")
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(
            "--node", "-n", metavar="NODE", help="On this node only.", autocompletion=completion.complete_nodes
        ),
    ] = None,
    priority: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="interactive, normal or batch; batch with -f, else interactive.",
            autocompletion=completion.complete_priorities,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="A model option; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as a JSON object.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the answer when it is whole.")] = False,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", "-j", metavar="N", min=1, help="With -f: prompts under way at a time."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.1, help="For each prompt, waiting included.")
    ] = None,
) -> None:
    """Send a prompt, or a file of them, through the balancer.

    Uses the running mesh, or opens one for as long as it takes. With -f the results are JSON lines in the order of
    the file, written as soon as they and all before them are there; a failed prompt has its `error` set, and the exit
    code is 1.

    \b
    Examples:
      gpumesh run "Why is the sky blue?"
      git diff | gpumesh run --system "Review this change."
      gpumesh run -m qwen2.5:7b -f prompts.txt -o temperature=0 > answers.jsonl
      gpumesh run -f - < prompts.jsonl
    """
    from gpumesh.balancer.base import Priority
    from gpumesh.cli.prompt_file import PromptEntry, read_options, read_prompts
    from gpumesh.daemon.session import PromptRequest

    if file is not None and prompt is not None:
        raise UsageError("either a prompt or -f FILE, not both")
    common = PromptRequest(
        messages=(),
        model=model,
        node=node,
        priority=Priority.BATCH if file is not None else Priority.INTERACTIVE,
        options=read_options(option or []),
        timeout_s=timeout,
    )
    if priority is not None:
        common = replace(common, priority=_priority(priority))
    chosen = global_options(ctx)
    if file is not None:
        prompts = read_prompts(_read(file), name="stdin" if file == "-" else file)
        asks = [entry.make_ask(common, system) for entry in prompts]
        failed = run_async(_many(chosen, asks, [entry.text for entry in prompts], concurrency))
        if failed:
            if not chosen.quiet:
                typer.echo(f"{failed} of {len(asks)} prompts failed; `error` in their lines says why", err=True)
            raise typer.Exit(int(ExitCode.FAILED))
        return
    text = _read("-") if prompt in (None, "-") else prompt
    assert text is not None
    if not text.strip():
        raise UsageError("the prompt is empty", hint='gpumesh run "Why is the sky blue?"')
    ask = PromptEntry(text).make_ask(common, system)
    run_async(_one(chosen, ask, text, as_json=as_json, stream=not no_stream and not as_json))


def _priority(text: str) -> Priority:
    from gpumesh.balancer.base import Priority

    try:
        return Priority(text)
    except ValueError:
        raise UsageError(f"--priority {text!r} is none of: {', '.join(Priority)}") from None


def _read(name: str) -> str:
    if name == "-":
        if sys.stdin.isatty():
            typer.echo("reading from the terminal; Ctrl-D ends the input", err=True)
        return sys.stdin.buffer.read().decode("utf-8", "replace")
    try:
        with open(name, "rb") as file:
            return file.read().decode("utf-8", "replace").removeprefix("\ufeff")
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from error


# -- one -------------------------------------------------------------------------------------------------------------


async def _one(chosen: GlobalOptions, ask: PromptRequest, text: str, *, as_json: bool, stream: bool) -> None:
    printer = _Printer()
    try:
        async with open_session(chosen) as session:
            result = await send_prompt(session, ask, 0, text, on_text=printer.feed if stream else None)
    except BaseException:
        printer.end()  # what comes next, an error or the shell's prompt, does not belong to the answer
        raise
    if as_json:
        typer.echo(json_text(asdict(result)))
    elif stream:
        printer.end()
    else:
        typer.echo(clean_text(result.response or ""))
    if chosen.verbose:
        rate = "" if result.tokens_per_s is None else f", {result.tokens} tokens at {result.tokens_per_s:.1f}/s"
        first = "" if result.ttft_ms is None else f", first token after {result.ttft_ms:.0f} ms"
        typer.echo(f"from {result.node} in {result.total_ms:.0f} ms{first}{rate}", err=True)


class _Printer:
    """A stream to stdout as it comes; ends with a newline, as commands do."""

    def __init__(self) -> None:
        self._last = "\n"

    def feed(self, piece: str) -> None:
        safe = clean_text(piece)
        if safe:
            sys.stdout.write(safe)
            sys.stdout.flush()
            self._last = safe[-1]

    def end(self) -> None:
        if self._last != "\n":
            self._last = "\n"
            with suppress(BrokenPipeError):
                sys.stdout.write("\n")
                sys.stdout.flush()


async def send_prompt(
    session: Session, ask: PromptRequest, index: int, text: str, *, on_text: Callable[[str], None] | None = None
) -> PromptResult:
    """Sends one prompt and reads its answer to the end. Raises GPUMeshError; cancelling it stops the generation."""
    began = time.perf_counter()
    first: float | None = None
    pieces: list[str] = []
    counters = None
    async with session.chat(ask) as stream:
        async for chunk in stream:
            if first is None and (chunk.text or chunk.thinking):
                first = time.perf_counter()
            if chunk.text:
                pieces.append(chunk.text)
                if on_text is not None:
                    on_text(chunk.text)
            counters = chunk.counters or counters
        node, attempts = stream.node, stream.attempts
    return PromptResult(
        index=index,
        prompt=text,
        response="".join(pieces),
        node=node,
        attempts=attempts,
        ttft_ms=None if first is None else round((first - began) * 1000, 1),
        total_ms=_ms(began),
        tokens=counters.tokens if counters is not None else None,
        tokens_per_s=_rounded(counters.tokens_per_s) if counters is not None else None,
    )


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 2)


# -- many ------------------------------------------------------------------------------------------------------------


async def _many(
    chosen: GlobalOptions, asks: Sequence[PromptRequest], texts: Sequence[str], concurrency: int | None
) -> int:
    """Writes the results in order; returns how many failed."""
    from gpumesh.cli.views import tables

    failed = 0
    async with open_session(chosen) as session:
        places = asyncio.Semaphore(concurrency or await _window(session))

        async def one(index: int) -> PromptResult:
            async with places:
                return await send_with_retries(session, asks[index], index, texts[index])

        with tables.show_progress(len(asks), "prompts", quiet=chosen.quiet) as tick:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index)) for index in range(len(asks))]
                done = 0

                def count(_: asyncio.Task[PromptResult]) -> None:
                    nonlocal done
                    done += 1
                    tick(done, f"{failed} failed" if failed else "")

                for task in tasks:
                    task.add_done_callback(count)
                for task in tasks:
                    result = await task
                    failed += result.error is not None
                    tick.write(json_text(asdict(result)))
    return failed


async def _window(session: Session) -> int:
    """How many prompts to have under way: a file must not wait for nodes that are away, nor flood the mesh's queue."""
    nodes = len((await session.status()).nodes)
    return min(max(nodes, 1) * PROMPTS_PER_NODE, MAX_CONCURRENT_PROMPTS)


async def send_with_retries(session: Session, ask: PromptRequest, index: int, text: str) -> PromptResult:
    """One prompt of many: its failure is a result, too. A full queue is waited for, and an answer that was cut is asked
    for again: nothing of it has been shown yet."""
    began = time.perf_counter()
    earlier = 0
    while True:
        try:
            result = await send_prompt(session, ask, index, text)
        except QueueFull as error:
            await asyncio.sleep(error.retry_after_s)
        except StreamCut as error:
            earlier += 1
            if earlier >= MAX_CUT_ANSWERS:
                return _failed(index, text, began, earlier, error)
        except UsageError:
            raise  # wrong for every prompt alike: say it once
        except GPUMeshError as error:
            return _failed(index, text, began, earlier, error)
        else:
            return replace(result, attempts=result.attempts + earlier, total_ms=_ms(began))


def _failed(index: int, text: str, began: float, attempts: int, error: GPUMeshError) -> PromptResult:
    return PromptResult(index, text, None, error.node, attempts, total_ms=_ms(began), error=error.message)


def _ms(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 1)
