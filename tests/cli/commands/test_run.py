"""`gpumesh run` by the installed command: prompts in, answers out, and what becomes of the others when one fails."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gpumesh.lab.profile import Faults
from tests.cli.meshes import MODEL, SimulatedMesh, background_mesh, quick_host, simulated_mesh
from tests.real.command import GPUMESH, Gpumesh
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.slow]

KEYS = ["index", "prompt", "response", "node", "attempts", "ttft_ms", "total_ms", "tokens", "tokens_per_s", "error"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SimulatedMesh]:
    """A mesh in the background, of two servers without SSH."""
    hosts = (quick_host("alpha", ssh=False), quick_host("beta", ssh=False))
    async with background_mesh(tmp_path_factory.mktemp("mesh"), *hosts) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def running(shared_mesh: SimulatedMesh) -> SimulatedMesh:
    """The mesh of this module, for the tests that only ask it."""
    await shared_mesh.wait_all_up()
    return shared_mesh


in_the_modules_loop = pytest.mark.asyncio(loop_scope="module")


async def test_one_prompt_in_every_way(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    await gpumesh("up", "-d")
    short = ("-o", "num_predict=3", "-o", "temperature=0")
    streamed = await gpumesh("run", "Hello", *short)
    assert len(streamed.out.split()) >= 1
    assert streamed.out.endswith("\n")
    assert streamed.err == ""
    whole = await gpumesh("run", "Hello", "--no-stream", *short)
    assert whole.out == streamed.out, "the stand-in says the same to the same prompt"
    assert (await gpumesh("run", *short, stdin="Hello")).out == streamed.out
    assert (await gpumesh("run", "-", *short, stdin="Hello")).out == streamed.out
    told = await gpumesh("run", "Hello", "--json", *short)
    result = told.json()
    assert list(result) == KEYS
    assert (result["index"], result["prompt"], result["attempts"], result["error"]) == (0, "Hello", 1, None)
    assert result["response"] == streamed.out.removesuffix("\n")
    assert result["tokens"] == 3
    assert result["node"] in ("alpha", "beta")
    for node in ("alpha", "beta"):
        assert (await gpumesh("run", "Hello", "--json", "--node", node, *short)).json()["node"] == node
    other = await gpumesh("run", "Hello", "--system", "Be brief.", *short)
    assert other.out != streamed.out
    verbose = await gpumesh("run", "Hello", "-v", *short)
    assert verbose.out == streamed.out
    assert "first token after" in verbose.err
    await gpumesh("down")
    assert "Hello" not in (await gpumesh("logs", "--json")).out, "prompts do not stand in the log"


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "said"),
    [
        (["run", ""], None, 2, "the prompt is empty"),
        (["run"], " \n", 2, "the prompt is empty"),
        (["run", "x", "-f", "y"], None, 2, "either a prompt or -f FILE"),
        (["run", "x", "-o", "temperature"], None, 2, "is not key=value"),
        (["run", "x", "--priority", "urgent"], None, 2, "none of: interactive, normal, batch"),
        (["run", "-f", "nowhere.txt"], None, 2, "cannot read nowhere.txt"),
        (["run", "-f", "-"], "\n\n", 2, "stdin has no prompts"),
        (["run", "-f", "-"], '{"prompt": "a"}\n{"promt": "b"}\n', 2, "stdin:2: unknown key 'promt'"),
        (["run", "-f", "-"], '{"prompt": "a"}\n5\n\n{\n', 2, "stdin has 2 wrong lines; no prompt was sent\nstdin:2: "),
        (["run", "-f", "-"], '{"prompt": "a"}\n{"prompt": "b", "node": "bata"}\n', 2,
         "stdin: the prompt of index 1: there is no node 'bata'\nhint: did you mean beta?"),
        (["run", "-f", "-", "--resume"], "a\n", 2, "--resume needs --out FILE"),
        (["run", "x", "--out", "y"], None, 2, "--out is for the prompts of -f FILE"),
        (["run", "-f", "-", "--out", "../mesh.yaml", "--resume"], "a\n", 2, "not a result of `gpumesh run -f`"),
        (["run", "x", "--node", "gamma"], None, 2, "there is no node 'gamma'"),
        (["run", "x", "-m", "phi4"], None, 4, "no node that is up has the model 'phi4'"),
        (["run", "x", "--nope"], None, 2, "No such option: --nope"),
    ],
)  # fmt: skip
async def test_what_is_refused(
    direct: SimulatedMesh, arguments: list[str], stdin: str | None, code: int, said: str
) -> None:
    ended = await direct.gpumesh(*arguments, stdin=stdin, code=code)
    assert ended.out == ""
    assert said in ended.err


@in_the_modules_loop
async def test_many_prompts_from_text_and_jsonl(running: SimulatedMesh, tmp_path: Path) -> None:
    gpumesh = running.gpumesh
    prompts = [f"Prompt {number} ü" for number in range(30)]
    text = tmp_path / "prompts.txt"
    text.write_text("\ufeff" + "\r\n".join(prompts) + "\n\n")
    ended = await gpumesh("run", "-f", str(text), "-o", "num_predict=2")
    results = ended.lines()
    assert ended.err == ""
    assert [result["index"] for result in results] == list(range(30))
    assert [result["prompt"] for result in results] == prompts
    assert all(list(result) == KEYS and result["error"] is None for result in results)
    assert {result["node"] for result in results} == {"alpha", "beta"}

    lines: list[Any] = [
        {"prompt": "one", "options": {"num_predict": 1}},
        "two",
        {"messages": [{"role": "user", "content": "first"}, {"role": "user", "content": "three"}], "node": "beta"},
        {"prompt": "four", "model": "missing"},
        {"prompt": "five", "system": "Be brief."},
    ]
    stdin = "\n".join(map(json.dumps, lines))
    ended = await gpumesh("run", "-f", "-", "-o", "num_predict=2", stdin=stdin, code=1)
    results = ended.lines()
    assert [result["prompt"] for result in results] == ["one", "two", "three", "four", "five"]
    assert [result["tokens"] for result in results] == [1, 2, 2, None, 2]
    assert results[2]["node"] == "beta"
    assert results[3]["response"] is None
    assert results[3]["error"] == "no node that is up has the model 'missing'"
    assert [result["error"] for result in results].count(None) == 4, "the others stand"
    assert ended.err == "1 of 5 prompts failed; `error` in their lines says why\n"
    quiet = await gpumesh("run", "-f", "-", "-q", stdin=json.dumps({"prompt": "x", "model": "missing"}), code=1)
    assert quiet.err == ""


@in_the_modules_loop
async def test_a_run_that_was_killed_is_gone_on_with(running: SimulatedMesh, tmp_path: Path) -> None:
    """Each prompt has exactly one result, whatever was written at the kill -9; what failed is sent again."""
    gpumesh = running.gpumesh
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("".join(f"prompt {number}\n" for number in range(300)))
    command = ("run", "-f", str(prompts), "-o", "num_predict=6", "--out", str(out), "--resume")
    async with gpumesh.started(*command) as process:
        await wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") > 20, "some results are written")
        process.kill()
        await process.wait()
    lines = out.read_text().splitlines()
    assert 20 < len(lines) < 300
    failed = {**json.loads(lines[3]), "response": None, "error": "no node"}
    lines[3] = json.dumps(failed)
    out.write_text("\n".join([*lines, lines[-1][:30]]))
    ended = await gpumesh(*command)
    assert ended.out == ""
    assert ended.err == f"{out} has {len(lines) - 1} of 300 answers already; failed and sent again: 1\n"
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(result["index"], result["prompt"]) for result in results] == [(n, f"prompt {n}") for n in range(300)]
    assert all(list(result) == KEYS and result["error"] is None for result in results)
    assert [json.dumps(result, ensure_ascii=False) for result in results[4 : len(lines)]] == lines[4:], "kept as it is"
    written = out.read_text()
    ended = await gpumesh("run", "-f", "-", *command[3:], stdin=prompts.read_text())
    assert (ended.err, out.read_text()) == (f"{out} has 300 of 300 answers already\n", written)
    other = await gpumesh("run", "-f", "-", *command[3:], stdin="x\n" + prompts.read_text(), code=2)
    assert "answers.jsonl:1: the prompt of index 0 is another one in stdin" in other.err
    assert out.read_text() == written


async def test_results_come_in_order_as_soon_as_they_can(gpumesh: Gpumesh) -> None:
    """The first prompt is on a slow host: what others say waits for it, and comes in one go."""
    slow = quick_host("slow", ssh=False, tokens_per_s=10.0, answer_tokens=(20, 20))
    async with simulated_mesh(gpumesh, slow, quick_host("fast", ssh=False)):
        lines = [{"prompt": "a", "node": "slow"}, *({"prompt": "b", "node": "fast"} for _ in range(3))]
        ended = await gpumesh("run", "-f", "-", stdin="\n".join(map(json.dumps, lines)))
    assert [result["node"] for result in ended.lines()] == ["slow", "fast", "fast", "fast"]


async def test_progress_is_on_stderr_alone(direct: SimulatedMesh, tmp_path: Path) -> None:
    """A bar on the terminal while the results go into a file: the usual way to run many prompts."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    out = tmp_path / "out.jsonl"
    async with direct.gpumesh.terminal("run", "-f", str(prompts), out=out) as shown:
        assert await shown.wait_exit() == 0
        await shown.wait_for_text("3/3")
        assert "index" not in shown.plain_text
    assert [json.loads(line)["index"] for line in out.read_text().splitlines()] == [0, 1, 2]
    async with direct.gpumesh.terminal("run", "-f", str(prompts), out=out, columns=60) as shown:
        assert await shown.wait_exit() == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(list(result) == KEYS for result in results)
    async with direct.gpumesh.terminal("run", "-f", str(prompts)) as shown:
        assert await shown.wait_exit() == 0
        await shown.wait_for_text('"index": 2')
        assert "3/3" in shown.plain_text
    async with direct.gpumesh.terminal("run", "-f", str(prompts), "-q", out=out) as shown:
        assert await shown.wait_exit() == 0
        assert shown.written == ""


@in_the_modules_loop
@pytest.mark.parametrize(
    "words",
    ["run -f {prompts}", "run long -o num_predict=400", "status -w --interval 0.1", "config show", "logs -f"],
)
async def test_a_reader_that_has_enough_ends_it_quietly(running: SimulatedMesh, tmp_path: Path, words: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("prompt\n" * 300)
    process = await asyncio.create_subprocess_shell(
        f"{GPUMESH} {words.format(prompts=prompts)} | head -c 1",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=running.gpumesh.environment(),
    )
    async with asyncio.timeout(40):
        out, errors = await process.communicate()
    assert errors == b""
    assert len(out) == 1


@pytest.fixture
async def endless(gpumesh: Gpumesh) -> AsyncIterator[SimulatedMesh]:
    """A host whose answers take much longer than any test."""
    async with simulated_mesh(
        gpumesh, quick_host("alpha", ssh=False, tokens_per_s=50.0, answer_tokens=(9000, 9000))
    ) as made:
        yield made


@pytest.mark.parametrize("detached", [True, False])
async def test_ctrl_c_ends_the_generation_on_the_host(endless: SimulatedMesh, detached: bool) -> None:
    host = endless.hosts["alpha"]
    if detached:
        await endless.gpumesh("up", "-d")
    async with endless.gpumesh.started("run", "go on") as process:
        assert process.stdout is not None
        assert await process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(20):
            assert await process.wait() == 130
        assert process.stderr is not None
        assert await process.stderr.read() == b""
    await wait_until(lambda: host.counters.in_flight == 0, "the generation has stopped")
    assert host.counters.cancelled == 1
    if detached:
        await endless.gpumesh("down")


async def test_an_answer_that_ends_in_an_error_ends_with_a_line(endless: SimulatedMesh) -> None:
    ended = await endless.gpumesh("run", "x", "--timeout", "1", code=1)
    assert ended.out.endswith("\n")
    assert len(ended.out) > 5
    assert ended.err.startswith("error: ")
    assert "deadline" in ended.err


async def test_a_node_that_fails_is_left_for_another(direct: SimulatedMesh) -> None:
    await direct.hosts["alpha"].set_faults(Faults(status=500, paths=("/api/chat",)))
    result = (await direct.gpumesh("run", "x", "--json", "-o", "num_predict=2")).json()
    assert (result["node"], result["error"]) == ("beta", None)


async def test_without_m_and_without_a_default_the_only_model_is_meant(gpumesh: Gpumesh) -> None:
    async with simulated_mesh(gpumesh, quick_host("alpha", ssh=False)) as made:
        made.write(default_model=None)
        assert (await gpumesh("run", "x", "-o", "num_predict=1")).out.strip()
    assert MODEL == "qwen2.5:7b"


async def test_hostile_answers_do_not_reach_the_terminal_as_they_are(direct: SimulatedMesh) -> None:
    """The stand-in repeats no prompt, so this is a server of its own."""
    piece = json.dumps(
        {"model": MODEL, "message": {"role": "assistant", "content": "a\x1b]0;x\x07b\x9bc"}, "done": False}
    )
    last = json.dumps(
        {"model": MODEL, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
    )
    body = f"{piece}\n{last}\n".encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        answers = {
            "/api/version": b'{"version": "0.12.6"}',
            "/api/tags": json.dumps({"models": [{"name": MODEL, "model": MODEL, "size": 1, "digest": "d"}]}).encode(),
            "/api/ps": b'{"models": []}',
            "/api/chat": body,
        }
        answer = answers.get(path, b"{}")
        kind = b"application/x-ndjson" if path == "/api/chat" else b"application/json"
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: " + kind)
        writer.write(b"\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        direct.write([{"name": "evil", "backend": {"url": f"http://127.0.0.1:{port}"}}])
        assert (await direct.gpumesh("run", "x")).out == "a]0;xbc\n"
        assert (await direct.gpumesh("run", "x", "--no-stream")).out == "a]0;xbc\n"
        told = await direct.gpumesh("run", "x", "--json")
    assert "\x1b" not in told.out
    assert "\x9b" not in told.out
    assert told.json()["response"] == "a\x1b]0;x\x07b\x9bc"


async def test_a_prompt_at_which_hosts_behind_ssh_hang_up_is_given_to_two(gpumesh: Gpumesh) -> None:
    """Their tunnels stand, so it was the servers."""
    names = ("alpha", "beta", "gamma")
    async with simulated_mesh(gpumesh, *(quick_host(name) for name in names)) as made:
        await gpumesh("up", "-d")
        await gpumesh("status", "--check")
        for host in made.hosts.values():
            await host.set_faults(Faults(disconnect=True, paths=("/api/chat",)))
        ended = await gpumesh("run", "x", code=4)
        assert "two servers failed at this request, so no other was asked" in ended.err
        state = (await gpumesh("status", "--json")).json()
        assert sum(node["load"]["failed"] for node in state["nodes"]) == 2
        await gpumesh("down")
