"""`gpumesh run`: sends a prompt, or a file of prompts, through the balancer, and prints the answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.duration_option import DURATION_METAVAR, duration_parser
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.open_session import open_session, run_async, running_topology
from gpumesh.cli.prompt_options import ModelSettingsOption, NodeOption, SystemOption
from gpumesh.cli.views.safe_text import clean_text, json_text
from gpumesh.errors import UsageError

if TYPE_CHECKING:
    from gpumesh.balancer.base import Priority
    from gpumesh.daemon.sessions.session import PromptRequest

app = new_app()


@app.command()
def run(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]...",
            help="The prompt, after a model of the fleet if it begins with one; - or nothing reads stdin.",
            show_default=False,
            autocompletion=completion.complete_models,
        ),
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
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="With -f: the results go to this new file.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the file of --out: send what has no answer in it.")
    ] = False,
    node: NodeOption = None,
    priority: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="interactive, normal or batch; batch with -f, else interactive.",
            autocompletion=completion.complete_priorities,
        ),
    ] = None,
    system: SystemOption = None,
    option: ModelSettingsOption = None,
    as_json: Annotated[bool, json_option("The result as a JSON object.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the answer when it is whole.")] = False,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", "-j", metavar="N", min=1, help="With -f: prompts under way at a time."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar=DURATION_METAVAR,
            parser=duration_parser(0.1),
            help="For each prompt, waiting included: 90s, 2m, or seconds.",
        ),
    ] = None,
) -> None:
    """Send a prompt, or a file of them, through the balancer.

    A first word that is a model of the fleet is the model, as with Ollama; a quoted prompt never is. Text that is
    piped in comes before the prompt. A model alone, on a terminal, opens a chat.

    Uses the running mesh, or opens one for as long as it takes. With -f the results are JSON lines in the order of
    the file, written as soon as they and all before them are there; a failed prompt has its `error` set, and the exit
    code is 1. The file may be of any length. No prompt is sent if a line of it is wrong. After a run that was
    stopped or killed, the same command with --resume keeps the answers and sends the other prompts.

    \b
    Examples:
      gpumesh run "Why is the sky blue?"
      gpumesh run llama3.2 why is the sky blue
      git diff | gpumesh run qwen2.5:7b "Review this change."
      gpumesh run -m qwen2.5:7b -f prompts.txt -o temperature=0 > answers.jsonl
      gpumesh run -f prompts.jsonl --out answers.jsonl --resume
      gpumesh run -f - < prompts.jsonl
    """
    from gpumesh.balancer.base import Priority
    from gpumesh.cli.prompt_files.send_file import send_file
    from gpumesh.cli.prompt_input import read_options
    from gpumesh.cli.standard_input import read_piped_text
    from gpumesh.daemon.sessions.prompt_requests import make_request
    from gpumesh.daemon.sessions.session import PromptRequest

    words = words or []
    common = PromptRequest(
        messages=(),
        model=model,
        node=node,
        priority=Priority.BATCH if file is not None else Priority.INTERACTIVE,
        options=read_options(option or []),
        timeout_s=timeout,
    )
    if priority is not None:
        common = replace(common, priority=_parse_priority(priority))
    options = global_options(ctx)
    if file is not None:
        if words:
            common = replace(common, model=_find_model_of_file(options, words, model))
        send_file(options, file, lambda entry: make_request(entry, common, system), out, concurrency, resume=resume)
        return
    if out is not None or resume:
        raise UsageError(f"{'--out' if out is not None else '--resume'} is for the prompts of -f FILE")
    piped_text = "" if sys.stdin.isatty() else read_piped_text()
    is_stdin_named = words[-1:] == ["-"]
    if is_stdin_named:  # the dash stands for stdin, which is read in any case
        words = words[:-1]
    if (words or not sys.stdin.isatty()) and not (piped_text + "".join(words)).strip():
        raise _empty_prompt_error()
    stream = not no_stream and not as_json  # a JSON object is printed as a whole
    may_chat = stream and not is_stdin_named and sys.stdin.isatty() and sys.stdout.isatty()
    run_async(
        _send_single(options, common, words, piped_text, system, as_json=as_json, stream=stream, may_chat=may_chat)
    )


def _parse_priority(text: str) -> Priority:
    """The value of ``--priority``. Raises UsageError for an unknown name."""
    from gpumesh.balancer.base import Priority

    try:
        return Priority(text)
    except ValueError:
        raise UsageError(f"--priority {text!r} is none of: {', '.join(Priority)}") from None


def _empty_prompt_error() -> UsageError:
    return UsageError("the prompt is empty", hint='gpumesh run "Why is the sky blue?"')


def _find_model_of_file(options: GlobalOptions, words: Sequence[str], model: str | None) -> str:
    """The model that stands before ``-f``. Raises UsageError if the words are anything else."""
    from gpumesh.cli.fleet_models import read_prompt_words

    async def find_model() -> str | None:
        async with open_session(options) as session:
            understood = await read_prompt_words(session, await running_topology(session, options), words)
        return None if understood.text else understood.model

    model_of_words = run_async(find_model()) if len(words) == 1 and model is None else None
    if model_of_words is None:
        raise UsageError("either a prompt or -f FILE, not both")
    return model_of_words


# -- one prompt ------------------------------------------------------------------------------------------------------


async def _send_single(
    options: GlobalOptions,
    common: PromptRequest,
    words: Sequence[str],
    piped_text: str,
    system: str | None,
    *,
    as_json: bool,
    stream: bool,
    may_chat: bool,
) -> None:
    """Sends one prompt, and prints its answer to stdout: in pieces as they come (``stream``), as a JSON object
    (``as_json``), or as a whole text. With ``--verbose`` prints the node and its speed to stderr. ``words``: those of
    the command line, perhaps with a model before the prompt. With ``may_chat`` a model alone opens a chat."""
    from gpumesh.batches.prompt_lines import PromptEntry
    from gpumesh.cli.fleet_models import may_be_model, read_prompt_words, require_model
    from gpumesh.cli.standard_input import read_terminal_text
    from gpumesh.daemon.sessions.prompt_requests import make_request
    from gpumesh.daemon.sessions.prompt_sender import send_prompt

    printer = _StreamPrinter()
    try:
        async with open_session(options) as session:
            text = " ".join(words)
            if common.model is None and words and may_be_model(words[0]):
                topology = await running_topology(session, options)
                understood = await read_prompt_words(session, topology, words)
                text = understood.text
                if understood.model is not None:
                    common = replace(common, model=understood.model)
                    if not text and may_chat:
                        from gpumesh.cli.chat.chat_loop import run_chat

                        await run_chat(session, topology, common, system, quiet=options.quiet)
                        return
            if not text and sys.stdin.isatty():
                # Says that the model is missing now, and not when the whole text has been typed.
                await require_model(session, await running_topology(session, options), common.model, common.node)
                text = await read_terminal_text()
            text = " ".join(part for part in (piped_text, text) if part)
            if not text.strip():
                raise _empty_prompt_error()
            request = make_request(PromptEntry(text), common, system)
            on_text = printer.feed if stream else None
            result = await send_prompt(session, request, 0, text, on_text=on_text)  # 0: the number of the only prompt
    except BaseException:
        printer.end()  # the error or the shell's prompt that follows gets a line of its own
        raise
    if as_json:
        typer.echo(json_text(asdict(result)))
    elif stream:
        printer.end()
    else:
        typer.echo(clean_text(result.response or ""))
    if options.verbose:
        rate_text = "" if result.tokens_per_s is None else f", {result.tokens} tokens at {result.tokens_per_s:.1f}/s"
        first_token_text = "" if result.ttft_ms is None else f", first token after {result.ttft_ms:.0f} ms"
        typer.echo(f"from {result.node} in {result.total_ms:.0f} ms{first_token_text}{rate_text}", err=True)


class _StreamPrinter:
    """Writes the pieces of an answer to stdout as they come, and ends with a newline."""

    def __init__(self) -> None:
        self._last_character = "\n"  # nothing was written yet, so the cursor is at the begin of a line

    def feed(self, piece: str) -> None:
        """Writes one piece."""
        safe_piece = clean_text(piece)
        if safe_piece:
            sys.stdout.write(safe_piece)
            sys.stdout.flush()
            self._last_character = safe_piece[-1]

    def end(self) -> None:
        """Writes a newline, unless the last piece ended with one. May be called twice."""
        if self._last_character != "\n":
            self._last_character = "\n"
            with suppress(BrokenPipeError):  # another error may be under way, which is to be reported
                sys.stdout.write("\n")
                sys.stdout.flush()
