"""ssh's questions, answered through the real askpass program."""

from __future__ import annotations

import asyncio
import json
import stat
import time
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import pytest

from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.openssh.prompts import AskpassServer
from tests.tunnels.recorded_events import RecordedEvents

PASSPHRASE = "Enter passphrase for key '/home/me/.ssh/id_ed25519': "
PASSWORD = "me@gpu.example's password: "
TRUST = "The authenticity of host 'gpu' can't be established. Are you sure (yes/no/[fingerprint])? "
TOUCH = "Confirm user presence for key ED25519-SK SHA256:abc"
SECRETS = {"password": "hunter2", "passphrase": "correct horse"}


def make_server(
    folder: Path, secrets: dict[str, str] | None = None, *answers: str, interactive: bool = False
) -> tuple[AskpassServer, RecordedEvents]:
    events = RecordedEvents(*answers)
    deadline = Deadline(10.0, time.monotonic)
    return AskpassServer(
        folder, SECRETS if secrets is None else secrets, events, deadline, interactive=interactive
    ), events


async def ask(program: Path, question: str) -> tuple[int, str]:
    """As ssh would."""
    process = await asyncio.create_subprocess_exec(program, question, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_secrets_answer_ssh_once(tmp_path: Path) -> None:
    server, _ = make_server(tmp_path)
    async with server:
        assert stat.S_IMODE((tmp_path / "ask").stat().st_mode) == 0o600
        assert stat.S_IMODE(server.askpass_path.stat().st_mode) == 0o700
        assert "hunter2" not in server.askpass_path.read_text()
        assert await ask(server.askpass_path, PASSPHRASE) == (0, "correct horse\n")
        assert await ask(server.askpass_path, PASSWORD) == (0, "hunter2\n")
        # A second question means that it was wrong: another try could lock the account.
        assert await ask(server.askpass_path, PASSWORD) == (1, "")
        assert await ask(server.askpass_path, TRUST) == (1, "")
        assert await ask(server.askpass_path, "Something else entirely: ") == (1, "")
    assert list(tmp_path.iterdir()) == []  # the login is over


async def test_the_same_passphrase_opens_several_keys(tmp_path: Path) -> None:
    server, _ = make_server(tmp_path)
    assert await server.answer_question(PASSPHRASE) == "correct horse"
    assert await server.answer_question(PASSPHRASE.replace("id_ed25519", "id_rsa")) == "correct horse"
    assert await server.answer_question(PASSPHRASE) is None


async def test_other_questions_go_to_a_person_as_printable_text(tmp_path: Path) -> None:
    server, events = make_server(tmp_path, {}, "123", interactive=True)
    async with server:
        assert await ask(server.askpass_path, "Code\x1b[2J\nfor you: ") == (0, "123\n")
        assert await ask(server.askpass_path, PASSWORD) == (1, "")  # they declined
    ((text, echo), _) = events.questions
    assert text.isprintable()
    assert "Code" in text
    assert echo is False


async def test_questions_about_trust_get_no_answer(tmp_path: Path) -> None:
    server, events = make_server(tmp_path, None, "yes", interactive=True)
    assert await server.answer_question(TRUST) is None
    assert events.questions == []


async def test_the_deadline_is_paused_while_a_key_waits_for_a_touch(tmp_path: Path) -> None:
    events, deadline = RecordedEvents(), Deadline(5.0, time.monotonic)
    server = AskpassServer(tmp_path, {}, events, deadline, interactive=False)
    waiting = asyncio.create_task(server.answer_question(TOUCH))
    await asyncio.sleep(0.01)
    assert deadline.remaining_s > 60.0
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert deadline.remaining_s <= 5.0


async def test_without_secrets_and_people_no_server_is_started(tmp_path: Path) -> None:
    server, _ = make_server(tmp_path, {})
    async with server:
        assert not server.can_answer
        assert list(tmp_path.iterdir()) == []


async def test_noise_on_the_socket_gets_no_secret(tmp_path: Path) -> None:
    server, _ = make_server(tmp_path)
    async with server:
        for line in (b"", b"{}\n", b"nonsense\n", b"12\n", b"x" * 100_000 + b"\n", b"\xff\xfe\n"):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "ask")
            writer.write(line)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 20)
            assert b"hunter2" not in answer
            assert b"horse" not in answer
            assert answer in (b"", b"null\n")
            writer.close()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "ask")
        writer.write(json.dumps(PASSWORD).encode() + b"\n")
        assert json.loads(await reader.readline()) == "hunter2"
        writer.close()
