"""`gpumesh chat`: a conversation with a model of the fleet, at the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.open_session import open_session, run_async, running_topology
from gpumesh.cli.prompt_options import ModelSettingsOption, NodeOption, SystemOption
from gpumesh.errors import UsageError

if TYPE_CHECKING:
    from gpumesh.daemon.sessions.session import PromptRequest

app = new_app()


@app.command()
def chat(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Else the default model, or one that is in memory.",
            autocompletion=completion.complete_models,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="The same as MODEL.", autocompletion=completion.complete_models
        ),
    ] = None,
    node: NodeOption = None,
    system: SystemOption = None,
    option: ModelSettingsOption = None,
) -> None:
    """Talk to a model at the terminal.

    Ctrl-C stops an answer, Ctrl-D ends the chat, and /help lists the commands. A line after each answer says which
    node gave it, and how fast. Uses the running mesh, or opens one for as long as the chat takes.

    \b
    Examples:
      gpumesh chat
      gpumesh chat llama3.2 --system "Answer in one sentence."
      gpumesh chat qwen2.5:7b --node iceland -o temperature=0
    """
    from gpumesh.cli.chat.chat_loop import require_terminal
    from gpumesh.cli.prompt_input import read_options
    from gpumesh.daemon.sessions.session import PromptRequest

    require_terminal()
    if name is not None and model is not None and name != model:
        raise UsageError(f"which model, {name} or {model}?")
    options = global_options(ctx)
    common = PromptRequest(messages=(), model=name or model, node=node, options=read_options(option or []))
    run_async(_chat(options, common, system))


async def _chat(options: GlobalOptions, common: PromptRequest, system: str | None) -> None:
    from gpumesh.cli.chat.chat_loop import run_chat

    async with open_session(options) as session:
        await run_chat(session, await running_topology(session, options), common, system, quiet=options.quiet)
