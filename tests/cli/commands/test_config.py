"""`gpumesh config`, and every kind of bad mesh.yaml: one clear report, exit code 2, whatever the command."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from gpumesh.cli import completion_scripts, root_command
from tests.real.command import CommandResult, Gpumesh

GOOD = "nodes: [{name: a, backend: {url: 'http://127.0.0.1:1'}}]\n"


def billion_laughs() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    return "\n".join(lines) + "\n"


def wrong(count: int) -> str:
    return "nodes:\n" + "".join(f"  - {{name: n{n}, ssh: {{host: h, port: {n}99999}}}}\n" for n in range(1, count + 1))


def bad(folder: Path, what: str) -> Path:
    """A path to give to --config."""
    file = folder / "bad.yaml"
    texts: dict[str, str | bytes] = {
        "empty": "",
        "only a comment": "# nothing\n",
        "tabs": "nodes:\n\t- name: a\n",
        "duplicated names": "nodes:\n  - {name: a, backend: {url: 'http://h:1'}}\n  - {name: a, ssh: {host: h}}\n",
        "a duplicated key": "name: a\nname: b\n" + GOOD,
        "port 99999": "nodes: [{name: a, ssh: {host: h, port: 99999}}]\n",
        "unknown keys": "gatway: {}\nnodes: [{name: a, ssh: {hots: h, prot: 22}, backnd: {port: 1}}]\n",
        "no nodes": "nodes: []\n",
        "no key nodes": "version: 1\n",
        "50 errors": wrong(50),
        "150 errors": wrong(150),
        "binary junk": random.Random(1).randbytes(4096),
        "a NUL": b"nodes: \0\n",
        "UTF-16": GOOD.encode("utf-16"),
        "10 MB": b"a" * (10 << 20),
        "billion laughs": billion_laughs(),
        "an alias to itself": "nodes: &n [*n]\n",
        "deep": "nodes: " + "[" * 5000,
        "unclosed": "nodes: [{name: a\n",
        "text": "just text\n",
        "a list": "- a\n- b\n",
        "two documents": f"{GOOD}---\n{GOOD}",
        "an escape": 'nodes: [{name: "a\\u001b[31mX"}]\n',
        "a secret": "nodes: [{name: a, ssh: {host: h, password: hunter2}}]\n",
        "a python object": "nodes: !!python/object/apply:os.system [echo owned]\n",
        "an unset variable": "nodes: [{name: a, ssh: {host: '${NO_SUCH_HOST}'}}]\n",
    }  # fmt: skip
    if what in texts:
        text = texts[what]
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    elif what == "a directory":
        file.mkdir()
    elif what == "a directory with a mesh.yaml":
        file.mkdir()
        (file / "mesh.yaml").write_text(GOOD)
    elif what == "a pipe":
        os.mkfifo(file)
    elif what == "a link to nowhere":
        file.symlink_to(folder / "nowhere")
    elif what == "a link to itself":
        file.symlink_to(file)
    elif what == "unreadable":
        # Also root cannot read it: a file of the kernel's that only gives an error.
        file = Path("/proc/self/mem")
    elif what == "a device":
        file = Path("/dev/zero")
    else:
        assert what == "absent"
    return file


REPORTS = {
    "empty": "bad.yaml: is empty",
    "only a comment": "bad.yaml: is empty",
    "a directory": "is a folder, not a mesh.yaml",
    "a directory with a mesh.yaml": "did you mean",
    "tabs": "bad.yaml:2:1: a tab indents this line",
    "duplicated names": "bad.yaml:3:6: nodes[1].name: 'a' is the name of nodes[0] already",
    "a duplicated key": "bad.yaml:2:1: name: this key is given twice; it stands on line 1 already",
    "port 99999": "bad.yaml:1:40: nodes[0].ssh.port: '99999' is not between 1 and 65535",
    "unknown keys": "nodes[0].ssh.hots: unknown key 'hots'; did you mean host?",
    "no nodes": "nodes: names no node",
    "no key nodes": "nodes: names no node",
    "50 errors": "error: 50 problems in the configuration",
    "150 errors": "error: more than 100 problems in the configuration",
    "binary junk": "is not UTF-8",
    "a NUL": "U+0000",
    "UTF-16": "is UTF-16: save it as UTF-8",
    "10 MB": "is larger than 1024 KiB",
    "billion laughs": "grows to more than 20000 values",
    "an alias to itself": "stands inside what it refers to",
    "deep": "bad.yaml:1:",
    "unclosed": "this is not YAML",
    "text": "keys with values are expected at the top",
    "a list": "keys with values are expected at the top",
    "two documents": "a second document begins here",
    "an escape": "the character U+001B has no place in a setting",
    "a secret": "a secret may not stand in the file",
    "a python object": "has no meaning here",
    "an unset variable": "the variable NO_SUCH_HOST is not set",
    "a pipe": "is not a file that can be read as text",
    "a device": "is not a file that can be read as text",
    "a link to nowhere": "it is a link that leads nowhere",
    "a link to itself": "it is a link that leads nowhere",
    "unreadable": "cannot be read: ",
    "absent": "does not exist",
}


@pytest.fixture
def run_here(
    gpumesh: Gpumesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CommandResult]:
    """Runs the command in this process, for tests of many inputs: a process for each takes a quarter of a second."""
    for name in ("HOME", "XDG_RUNTIME_DIR", "GPUMESH_CONFIG"):
        monkeypatch.setenv(name, gpumesh.environment()[name])
    for name in ("install_completion_scripts", "filter_typer_completions"):  # they change typer for the whole process
        monkeypatch.setattr(completion_scripts, name, lambda: None)

    def run(*arguments: str) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["gpumesh", *arguments])
        began = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            root_command.run_app()
        out, err = capsys.readouterr()
        return CommandResult(int(ended.value.code or 0), out, err, time.monotonic() - began)

    return run


@pytest.mark.parametrize("what", REPORTS)
def test_bad_input_is_one_clear_report(run_here: Callable[..., CommandResult], tmp_path: Path, what: str) -> None:
    ended = run_here("config", "check", "-c", str(bad(tmp_path, what)))
    assert ended.code == 2, ended
    assert ended.out == ""
    assert REPORTS[what] in ended.err
    assert ended.err.startswith("error: ")
    assert ended.err.count("error: ") == 1
    assert all(character.isprintable() or character == "\n" for character in ended.err)
    assert len(ended.err.splitlines()) <= 102
    assert max(map(len, ended.err.splitlines())) < 400
    assert "hunter2" not in ended.err
    assert ended.wall_s < 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["status"], ["run", "x"], ["up"], ["up", "-d"], ["models"], ["exec", "a", "--", "true"], ["audit"], ["env"],
     ["config", "show"], ["trust", "a"], ["bench", "run"]],
)  # fmt: skip
async def test_every_command_gives_the_same_report(gpumesh: Gpumesh, tmp_path: Path, arguments: list[str]) -> None:
    gpumesh.config.symlink_to(bad(tmp_path, "port 99999"))
    ended = await gpumesh(*arguments, code=2)
    assert REPORTS["port 99999"] in ended.err
    assert ended.out == ""
    assert gpumesh.processes() == set()


# -- check -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_check_says_what_will_probably_not_work(gpumesh: Gpumesh, tmp_path: Path) -> None:
    gpumesh.config.write_text(GOOD)
    ended = await gpumesh("config", "check")
    assert ended.out == f"{gpumesh.config} is valid: 1 node\n"
    assert ended.err == ""
    assert (await gpumesh("config", "check", "-q")).out == ""

    gpumesh.config.write_text(
        "nodes:\n  - {name: a, ssh: {host: h, agent: false, identity_file: /no/key}}\n"
        "  - {name: b, enabled: false, ssh: {host: h}}\n"
    )
    ended = await gpumesh("config", "check", code=2)
    assert "is valid: 2 nodes, 1 of them disabled; but not all of it can work from here\n" in ended.out
    assert "error: a: the key file /no/key cannot be read" in ended.err
    assert "hint: check `ssh.identity_file`" in ended.err


# -- show, schema ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_show_has_every_default_and_no_secret_and_can_be_read_again(gpumesh: Gpumesh) -> None:
    gpumesh.config.write_text(
        "nodes:\n  - name: a\n    ssh: {host: '${SITE:-iceland}', password_env: POD_PASSWORD}\n"
        "    address_from: {command: [curl, -H, 'Authorization: hunter2-hunter2']}\n"
    )
    async with gpumesh.terminal("config", "show", POD_API_KEY="hunter2-hunter2") as shown:
        assert await shown.wait_exit() == 0
        await shown.wait_for_text("Authorization: ********")
        assert "hunter2" not in shown.plain_text
    text = (await gpumesh("config", "show")).out
    document = yaml.safe_load(text)
    assert document["nodes"][0]["ssh"]["host"] == "iceland"
    assert document["nodes"][0]["ssh"]["password_env"] == "POD_PASSWORD"
    assert document["gateway"]["policy"] == "adaptive"
    gpumesh.config.write_text(text)
    assert (await gpumesh("config", "show")).out == text


@pytest.mark.slow
async def test_schema_is_for_any_json_schema_validator(gpumesh: Gpumesh) -> None:
    schema = (await gpumesh("config", "schema")).json()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(GOOD), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"nodes": [{"name": "a", "ssh": {"port": 99999}}]}, schema)


@pytest.mark.slow
async def test_without_a_command_it_says_which_there_are(gpumesh: Gpumesh) -> None:
    ended = await gpumesh("config", code=2)
    for command in ("check", "show", "schema"):
        assert command in ended.out + ended.err


# -- which file ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_which_file_is_meant(gpumesh: Gpumesh, tmp_path: Path) -> None:
    def named(name: str) -> str:
        return f"name: {name}\n{GOOD}"

    gpumesh.config.write_text(named("by-variable"))
    (gpumesh.home / "mesh.yaml").write_text(named("here"))
    (tmp_path / "other.yaml").write_text(named("by-option"))
    folder = gpumesh.home / ".config" / "gpumesh"
    folder.mkdir(parents=True)
    (folder / "mesh.yaml").write_text(named("of-the-platform"))

    async def name(*arguments: str, variable: str = str(gpumesh.config)) -> str:
        async with gpumesh.terminal(*arguments, "config", "show", GPUMESH_CONFIG=variable) as shown:
            assert await shown.wait_exit() == 0
            await shown.wait_for_text("name: a")
            return str(yaml.safe_load(shown.plain_text)["name"])

    assert await name("-c", str(tmp_path / "other.yaml")) == "by-option"
    assert await name() == "by-variable"
    assert await name(variable="") == "here"
    (gpumesh.home / "mesh.yaml").unlink()
    assert await name(variable="") == "of-the-platform"
    (folder / "mesh.yaml").unlink()
    async with gpumesh.terminal("status", GPUMESH_CONFIG="") as shown:
        assert await shown.wait_exit() == 2
        await shown.wait_for_text("hint: `gpumesh init` writes one, `gpumesh demo` needs none")


async def test_the_hash_of_a_key_is_that_of_sha256sum(gpumesh: Gpumesh) -> None:
    key = "gm-0123456789abcdef0123456789abcdef"
    result = await gpumesh("config", "hash-key", stdin=f"{key}\n")
    assert (result.out, result.err) == (f"{hashlib.sha256(key.encode()).hexdigest()}\n", "")


async def test_a_new_key_and_its_hash(gpumesh: Gpumesh) -> None:
    lines = (await gpumesh("config", "hash-key", "--new")).out.splitlines()
    key, digest = (line.split()[1] for line in lines)
    assert len(key) > 40
    assert hashlib.sha256(key.encode()).hexdigest() == digest


@pytest.mark.parametrize(
    ("stdin", "code", "message"),
    [
        ("", 2, "there is no key to hash"),
        ("two words", 2, "a key is one word in one line"),
        ("sk-hunter2", 0, "so short a key can be found from its hash"),
    ],
)
async def test_a_key_that_is_none_or_weak(gpumesh: Gpumesh, stdin: str, code: int, message: str) -> None:
    result = await gpumesh("config", "hash-key", stdin=stdin, code=code)
    assert message in result.err
    assert "hunter2" not in result.out + result.err
