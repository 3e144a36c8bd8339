"""`gpumesh chat`, and `gpumesh run` in Ollama's order, by the installed command on terminals."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from gpumesh.lab.profile import QWEN3_8B, QWEN_7B, Faults, ModelProfile
from tests.cli.meshes import MODEL, SimulatedMesh, background_mesh, quick_host
from tests.real.terminal import Terminal
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

LLAMA = ModelProfile("llama3.2:latest")
PLACEHOLDER = "Send a message"
SHORT = ("-o", "num_predict=3")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SimulatedMesh]:
    """A mesh in the background, of two servers without SSH."""
    models = (QWEN_7B, LLAMA, QWEN3_8B)
    hosts = [
        quick_host(name, ssh=False, models=models, tokens_per_s=100.0, answer_tokens=(400, 500))
        for name in ("alpha", "beta")
    ]
    async with background_mesh(tmp_path_factory.mktemp("mesh"), *hosts) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def running(shared_mesh: SimulatedMesh) -> AsyncIterator[SimulatedMesh]:
    await shared_mesh.wait_all_up()
    yield shared_mesh
    for host in shared_mesh.hosts.values():
        await host.set_faults(Faults())


class Chat:
    """A chat on a terminal. ``place`` is how far its output was looked at."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.place = 0

    async def see(self, text: str) -> None:
        try:
            self.place = await self.terminal.wait_for_text(text, after=self.place)
        except TimeoutError as error:
            raise AssertionError(f"{text!r} is not in {self.terminal.plain_text[self.place :]!r}") from error

    async def say(self, line: str, answer: str) -> None:
        """Types a line, and waits for a text after it and for the next empty line."""
        self.terminal.press(f"{line}\r")
        await self.see(answer)
        await self.see(PLACEHOLDER)


async def test_a_chat_from_its_first_line_to_its_last(running: SimulatedMesh) -> None:
    file = running.gpumesh.home / "talk.json"  # which is the command's working folder
    async with running.gpumesh.terminal("chat", "llama3.2", "--system", "Be brief.", *SHORT, columns=100) as shown:
        chat = Chat(shown)
        await chat.see(f"{LLAMA.name} · /help lists commands")
        await chat.see(PLACEHOLDER)
        await chat.say("Hello", " · 3 tokens · 100.0 tokens/s · first token after ")
        await chat.say('"""two\rlines"""', " · 3 tokens")
        await chat.say("one\x1b\rtwo", " · 3 tokens")
        await chat.say("/node beta", "only beta answers")
        await chat.say("More", "beta · 3 tokens")
        shown.press("Again\r\x1b[200~typed ahead\rin two lines\x1b[201~")
        await chat.see("beta · 3 tokens")
        await chat.see("in two lines")
        shown.press("\x03")
        await chat.see(PLACEHOLDER)
        await chat.say("/node gamma", "hint: there are: auto, alpha, beta")
        await chat.say("/modle", "did you mean /model?")
        await chat.say("/model qwen2.5", f"did you mean {MODEL}?")
        await chat.say("/model qwen3:8b", "qwen3:8b answers from now on")
        await chat.say("/set parameter num_predict 16", "num_predict is 16")
        await chat.say("Think", "thinking …")
        assert "… done" in shown.plain_text
        await chat.say(f"/save {file.name}", "saved to")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        saved = file.read_text()
        shown.press(f"/save {file.name}\r")
        await chat.see("overwrite it? [y/N]")
        await chat.say("n", "was left as it is")
        assert file.read_text() == saved
        await chat.say("/clear", "what was said is forgotten")
        await chat.say(f"/load {file.name}", "12 messages from")
        await chat.say("/show", "messages    12")
        shown.press("/mo")
        await chat.see("talk to another model")  # the menu of the commands that begin so
        shown.press("\t")
        await chat.see("/model")
        await chat.say("", "* qwen3:8b")
        shown.press("\x04")
        assert await shown.wait_exit() == 0
        assert shown.is_restored()
        assert shown.written.rfind("\x1b[?2004l") > shown.written.rfind("\x1b[?2004h"), "pastes are as before"
    document = json.loads(saved)
    assert (document["schema"], document["model"], document["system"]) == ("gpumesh.chat/1", "qwen3:8b", "Be brief.")
    asked = [message["content"] for message in document["messages"][::2]]
    assert asked == ["Hello", "two\nlines", "one\ntwo", "More", "Again", "Think"]
    (history,) = running.gpumesh.home.rglob("chat_history")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert json.loads(history.read_text().splitlines()[0]) == "Hello"


async def test_ctrl_c_stops_the_answer_and_not_the_chat(running: SimulatedMesh) -> None:
    hosts = running.hosts.values()
    async with running.gpumesh.terminal("chat", "-o", "num_predict=5000", columns=60) as shown:
        chat = Chat(shown)
        await chat.see(f"{MODEL} · ")
        shown.press("go on\r")
        await wait_until(lambda: sum(host.counters.in_flight for host in hosts) == 1, "the answer is under way")
        place = len(shown.plain_text)
        shown.resize(40, 20)
        await wait_until(lambda: len(shown.plain_text) > place + 300, "the answer goes on")
        lines = re.split(r"\r?\n", shown.plain_text[place:])[2:-1]
        assert lines
        assert max(map(len, lines)) <= 40, "after the change of the size"
        threads = Path(f"/proc/{shown.process.pid}/task")
        assert len(list(threads.iterdir())) == 1
        # What is typed meanwhile is not echoed into the answer.
        shown.press("\x1b[200~typed\rahead\x1b[201~")
        place = len(shown.plain_text)
        await wait_until(lambda: len(shown.plain_text) > place + 100, "the answer goes on")
        assert "typed" not in shown.plain_text
        shown.press("\x03")
        await chat.see("stopped")
        await wait_until(lambda: sum(host.counters.in_flight for host in hosts) == 0, "the generation has stopped")
        await chat.see(PLACEHOLDER)
        shown.press("some text")
        await chat.see("some text")
        shown.press("\x03")  # clears the line
        await chat.see(PLACEHOLDER)
        shown.press("\x03")
        await chat.see("Ctrl-C once more")
        shown.press("\x03")
        assert await shown.wait_exit() == 0
        assert shown.is_restored()


async def test_a_node_that_dies_in_mid_answer(running: SimulatedMesh) -> None:
    """Another node goes on with the answer. Where none can, a sentence says so, and what was typed stands there."""
    hosts = running.hosts
    async with running.gpumesh.terminal("chat", "-o", "num_predict=150", columns=100) as shown:
        chat = Chat(shown)
        await chat.see(f"{MODEL} · ")
        shown.press("long\r")
        await wait_until(lambda: len(shown.plain_text) > chat.place + 150, "a node answers")
        name, other = sorted(hosts, key=lambda name: hosts[name].counters.in_flight, reverse=True)
        await hosts[name].set_faults(Faults(refuse=True))
        await chat.see(f"{name} then {other} · ")
        await chat.see(PLACEHOLDER)
        await chat.say(f"/node {other}", f"only {other} answers")
        shown.press("precious words\r")
        await wait_until(lambda: len(shown.plain_text) > chat.place + 150, "the node answers")
        await hosts[other].set_faults(Faults(refuse=True))
        await chat.see("error: ")
        await chat.see(">>> precious words")
        await hosts[other].set_faults(Faults())
        await hosts[name].set_faults(Faults())
        await running.wait_all_up()
        shown.press("\r")
        await chat.see(f"{other} · ")
        await chat.see(PLACEHOLDER)
        shown.press("/bye\r")
        assert await shown.wait_exit() == 0


async def test_run_in_ollamas_order(running: SimulatedMesh) -> None:
    async def run(*words: str, stdin: str | None = None) -> str:
        result = (await running.gpumesh("run", *words, *SHORT, "--json", stdin=stdin)).json()
        return f"{result['prompt']}|{result['tokens']}"

    assert await run("llama3.2", "why", "is", "it", stdin="a text") == "a text why is it|3"
    assert await run("Why", "is", "the", "sky", "blue") == "Why is the sky blue|3"
    wrong = await running.gpumesh("run", "llama3.2:1b", "why", code=4)
    assert "did you mean llama3.2:latest?" in wrong.err
    assert "words between quotes are always a prompt" in wrong.err
    many = await running.gpumesh("run", "llama3.2", "-f", "-", *SHORT, stdin="a\nb\n")
    assert [line["tokens"] for line in many.lines()] == [3, 3]


async def test_run_on_a_terminal(running: SimulatedMesh) -> None:
    """A model alone opens a chat; a missing model is told before the text is read."""
    async with running.gpumesh.terminal("run", "llama3.2") as shown:
        await shown.wait_for_text(PLACEHOLDER)
        shown.press("\x04")
        assert await shown.wait_exit() == 0
    async with running.gpumesh.terminal("run", "-m", "phi4") as shown:
        assert await shown.wait_exit() == 4
        assert "no node that is up has the model 'phi4'" in shown.plain_text
        assert "reading from the terminal" not in shown.plain_text
    async with running.gpumesh.terminal("run", "-m", "llama3.2", *SHORT) as shown:
        await shown.wait_for_text("reading from the terminal")
        shown.press("Hello\n\x04")
        assert await shown.wait_exit() == 0


async def test_no_terminal(running: SimulatedMesh) -> None:
    refused = await running.gpumesh("chat", stdin="Hello\n", code=2)
    assert refused.err.startswith("error: chat needs a terminal")
    assert "gpumesh run" in refused.err
