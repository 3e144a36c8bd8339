"""`gpumesh notify test`: sends a message by each rule of `notify` in mesh.yaml, to see that it arrives."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.open_session import run_async
from gpumesh.errors import ExitCode, GPUMeshError, UsageError

if TYPE_CHECKING:
    from gpumesh.notify.messages import Message
    from gpumesh.topology import NotifySpec

app = new_app(no_args_is_help=True)


@app.callback()
def notify() -> None:
    """Who is told when something happens: the section `notify` of mesh.yaml."""


@app.command()
def test(ctx: typer.Context) -> None:
    """Send a test message by each rule of mesh.yaml, and say what arrived.

    \b
    In mesh.yaml:
      notify:
        - {webhook_env: SLACK_HOOK, format: slack, on: [node-down, all-down]}
        - {webhook: https://ntfy.sh/my-mesh, format: ntfy, quiet: 10m}
        - {command: [./on-call.sh]}
        - {desktop: true}
    """
    from gpumesh.cli.views.safe_text import clean_line

    topology = global_options(ctx).topology()
    if not topology.notify:
        raise UsageError("mesh.yaml has no section `notify`", hint="`gpumesh notify test --help` shows one")
    results = run_async(_send_all(topology.notify, _make_message(topology.name)))
    for rule, error in zip(topology.notify, results, strict=True):
        typer.echo(clean_line(f"{rule.receiver}: {'sent' if error is None else error.message}"))
        if error is not None and error.hint and "notify test" not in error.hint:
            typer.echo(clean_line(f"  hint: {error.hint}"), err=True)
    if any(error is not None for error in results):
        raise typer.Exit(int(ExitCode.FAILED))


def _make_message(mesh: str) -> Message:
    """The message that is sent as a test."""
    from datetime import UTC, datetime

    from gpumesh.notify.events import MeshEvent
    from gpumesh.notify.messages import Message
    from gpumesh.notify.outbox import PendingEvent
    from gpumesh.topology import EventKind

    event = MeshEvent(EventKind.NODE_UP, None, "a test: messages of this mesh arrive here")
    return Message(mesh, datetime.now(UTC), [PendingEvent(event, 1)])


async def _send_all(rules: tuple[NotifySpec, ...], message: Message) -> list[GPUMeshError | None]:
    """Sends the message by all rules at the same time. Returns the error of each rule; ``None``: it was sent."""
    from gpumesh.notify.senders import send

    async def send_by(rule: NotifySpec) -> GPUMeshError | None:
        try:
            await send(rule, message)
        except GPUMeshError as error:
            return error
        return None

    return await asyncio.gather(*(send_by(rule) for rule in rules))
