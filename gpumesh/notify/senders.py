"""Sends a message: to a webhook, to a command of the user, or to the desktop of this machine.

A send that fails is tried again a few times, because a webhook is away now and then. The reason of a failure never
holds the address of a webhook: whoever knows it can post there.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile

from gpumesh import config
from gpumesh.errors import GPUMeshError
from gpumesh.notify.messages import HttpBody, Message, escape_markup, render_document, render_http
from gpumesh.text.printable import printable
from gpumesh.topology import NotifySpec
from gpumesh.tunnels.local_system.local_command import local_command, read_at_most

WEBHOOK_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 30.0
MAX_OUTPUT_BYTES = 8 << 10  # of a command; the rest is dropped
RETRY_DELAYS_S = (2.0, 10.0, 60.0)  # before the second, third and fourth attempt
# The text is an argument of the script, and no part of it.
_APPLE_SCRIPT = "on run argv\ndisplay notification (item 2 of argv) with title (item 1 of argv)\nend run"


class NotifyFailed(GPUMeshError):
    """A message could not be sent."""

    code = "notify"
    default_hint = "`gpumesh notify test` sends a message by each rule, and says what goes wrong"


async def send(spec: NotifySpec, message: Message) -> None:
    """Sends the message once. Raises NotifyFailed, and SecretMissing if a variable of the rule is not set."""
    if spec.command:
        await _run(spec.command, json.dumps(render_document(message)).encode(), COMMAND_TIMEOUT_S)
    elif spec.desktop:
        await _run(_desktop_command(message), b"", COMMAND_TIMEOUT_S)
    else:
        await _post(spec, render_http(message, spec.format))


async def send_until_done(spec: NotifySpec, message: Message) -> None:
    """Sends the message, and tries again after ``RETRY_DELAYS_S``. Raises the error of the last attempt."""
    for delay_s in RETRY_DELAYS_S:
        try:
            await send(spec, message)
        except NotifyFailed:
            await asyncio.sleep(delay_s)
        else:
            return
    await send(spec, message)


async def _post(spec: NotifySpec, body: HttpBody) -> None:
    """Posts the message to the webhook. Raises NotifyFailed, without the address: it may hold a secret."""
    import httpx

    url = spec.webhook if spec.webhook_env is None else config.read_secret(spec.webhook_env)
    assert url is not None, "the reader of mesh.yaml lets no rule without a receiver through"
    headers = dict(body.headers)
    if spec.token_env is not None:
        headers["Authorization"] = f"Bearer {config.read_secret(spec.token_env)}"
    try:
        # Unlike a node's server, a webhook may be behind the proxy that the environment names.
        async with (
            httpx.AsyncClient(timeout=WEBHOOK_TIMEOUT_S, follow_redirects=False) as client,
            client.stream("POST", url, content=body.content, headers=headers) as response,
        ):
            status = response.status_code
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        # The error's text may hold the address.
        raise NotifyFailed(f"the webhook could not be reached ({type(error).__name__})") from None
    if not 200 <= status < 300:
        raise NotifyFailed(f"the webhook answered {status}")


def _desktop_command(message: Message) -> tuple[str, ...]:
    """The command that shows the message on the desktop. Raises NotifyFailed if this machine has none."""
    text = "\n".join(message.lines)
    if sys.platform == "darwin":
        return ("osascript", "-e", _APPLE_SCRIPT, message.title, text)
    if shutil.which("notify-send") is None:
        raise NotifyFailed("this machine has no notify-send, which shows a message on its desktop")
    return ("notify-send", "--app-name=gpumesh", "--", message.title, escape_markup(text))


async def _run(argv: tuple[str, ...], document: bytes, timeout_s: float) -> None:
    """Runs a command that reads ``document`` from its standard input. Raises NotifyFailed unless it exits with 0."""
    program = printable(argv[0], 80)
    try:
        # A file in place of a pipe: we never wait for a command that does not read its input.
        with tempfile.TemporaryFile() as stdin:
            stdin.write(document)
            stdin.seek(0)
            async with local_command(argv, stdin=stdin) as process, asyncio.timeout(timeout_s):
                output, _ = await read_at_most(process.stdout, MAX_OUTPUT_BYTES)
                errors, _ = await read_at_most(process.stderr, MAX_OUTPUT_BYTES)
                status = await process.wait()
    except TimeoutError:
        raise NotifyFailed(f"{program} did not end within {timeout_s:g} s") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "an argument holds a NUL"
        raise NotifyFailed(f"{program} cannot be started: {reason}") from error
    if status != 0:
        last_line = printable((errors or output).strip().rpartition(b"\n")[2], 200)
        raise NotifyFailed(f"{program} ended with {status}" + (f": {last_line}" if last_line else ""))
