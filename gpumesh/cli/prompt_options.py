"""The options of the commands that send prompts (`run`, `chat`)."""

from __future__ import annotations

from typing import Annotated

import typer

from gpumesh.cli import completion

NodeOption = Annotated[
    str | None,
    typer.Option("--node", "-n", metavar="NODE", help="On this node only.", autocompletion=completion.complete_nodes),
]
SystemOption = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")]
ModelSettingsOption = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="A model option; repeatable.")
]
