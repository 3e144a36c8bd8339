"""Each way of sending, to real servers and with real programs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from gpumesh.errors import SecretMissing
from gpumesh.notify.messages import Message
from gpumesh.notify.outbox import PendingEvent
from gpumesh.notify.senders import NotifyFailed, send
from gpumesh.topology import NotifyFormat, NotifySpec
from tests.mesh.servers import answer_with, serve
from tests.notify.test_messages import message

OK = answer_with(b"HTTP/1.1 204 No Content\r\n\r\n")


async def test_a_webhook_gets_the_message_and_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_TOKEN", "s3cret-token")
    async with serve(OK) as server:
        rule = NotifySpec(webhook=f"{server.url}/T0/B0?x=1", token_env="HOOK_TOKEN")
        await send(rule, message())
        (request,) = server.requests
    assert request.head.startswith(b"POST /T0/B0?x=1 HTTP/1.1\r\n")
    assert b"authorization: bearer s3cret-token" in request.head.lower()
    assert json.loads(request.body)["text"] == "home: a is down (look)"


async def test_the_address_may_come_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = NotifySpec(webhook_env="THE_HOOK", format=NotifyFormat.SLACK)
    with pytest.raises(SecretMissing, match="THE_HOOK"):
        await send(rule, message())
    async with serve(OK) as server:
        monkeypatch.setenv("THE_HOOK", server.url)
        await send(rule, message())
        assert json.loads(server.requests[0].body) == {"text": "home: a is down (look)"}


async def test_a_failure_never_names_the_address() -> None:
    async with serve(answer_with(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")) as server:
        with pytest.raises(NotifyFailed) as refused:
            await send(NotifySpec(webhook=f"{server.url}/s3cret"), message())
    with pytest.raises(NotifyFailed) as away:
        await send(NotifySpec(webhook=f"{server.url}/s3cret"), message())
    assert refused.value.message == "the webhook answered 404"
    assert away.value.message == "the webhook could not be reached (ConnectError)"
    for error in (refused.value, away.value):
        assert "s3cret" not in f"{error!r} {error.__cause__!r}"


async def test_a_redirect_is_not_followed() -> None:
    """A token would go to another server."""
    async with serve(OK) as other:
        head = f"HTTP/1.1 302 Found\r\nLocation: {other.url}/\r\nContent-Length: 0\r\n\r\n".encode()
        async with serve(answer_with(head)) as server:
            with pytest.raises(NotifyFailed, match="302"):
                await send(NotifySpec(webhook=server.url), message())
        assert not other.requests


async def test_a_command_reads_the_message(tmp_path: Path) -> None:
    target = tmp_path / "got.json"
    program = f"import sys; open({str(target)!r}, 'w').write(sys.stdin.read())"
    await send(NotifySpec(command=(sys.executable, "-c", program)), message())
    assert json.loads(target.read_text())["events"][0]["node"] == "a"


async def test_a_command_that_ignores_its_input_is_no_problem() -> None:
    await send(NotifySpec(command=("true",)), Message("home", message().at, [*message().events] * 4000))


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("false",), "false ended with 1"),
        (("sh", "-c", "echo one; echo the reason >&2; exit 3"), "sh ended with 3: the reason"),
        (("/no/such/program",), "/no/such/program cannot be started: No such file or directory"),
    ],
)
async def test_a_command_that_fails(command: tuple[str, ...], reason: str) -> None:
    with pytest.raises(NotifyFailed) as failed:
        await send(NotifySpec(command=command), message())
    assert failed.value.message == reason


async def test_the_desktop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for notify-send, which needs a desktop: it writes down its arguments."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotifyFailed, match="no notify-send"):
        await send(NotifySpec(desktop=True), message())
    program = tmp_path / "notify-send"
    program.write_text(f'#!/bin/sh\nfor word; do echo "$word"; done > {tmp_path}/words\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    marked = PendingEvent(message().events[0].event, 2)
    await send(NotifySpec(desktop=True), Message("<b>", message().at, [marked]))
    assert (tmp_path / "words").read_text().splitlines() == [
        "--app-name=gpumesh",
        "--",
        "<b>: a node-down",
        "a is down (look) — 2 changes since the last message",
    ]
