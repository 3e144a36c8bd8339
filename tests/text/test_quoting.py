from __future__ import annotations

import ast
import json
import random
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given

import gpumesh
from gpumesh.config.mesh_file import variable_expansion, yaml_tree
from gpumesh.text.quoting import is_plain, paste_command, powershell_word, shell_word, yaml_text
from tests.hostile_names import ANY_NAME, NAMES, SHELLS, split_with_shell

PACKAGE = Path(gpumesh.__file__).parent


@pytest.mark.parametrize("word", ["qwen2.5:7b", "hf.co/me/x-GGUF:Q4_K_M", "u@h", "a+b", "/x/y", "1"])
def test_plain_words_are_not_quoted(word: str) -> None:
    assert is_plain(word)
    assert shell_word(word) == word
    assert paste_command("gpumesh models pull {MODEL}", MODEL=word) == f"`gpumesh models pull {word}`"


@pytest.mark.parametrize("word", [*NAMES, "", "x\n", "a=b", "%1", "^x", "a{b,c}", "é"])
def test_special_words_are_not_plain(word: str) -> None:
    assert not is_plain(word)


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_reads_the_quoted_text_as_one_word(shell: str, tmp_path: Path) -> None:
    randomness = random.Random(20261129)
    signs = "`$(){}[];&|<>'\"\\\\\\'!*?~=#%:,-@ \n\té日ab"
    made = ["".join(randomness.choices(signs, k=randomness.randrange(1, 9))) for _ in range(1500)]
    texts = [*NAMES, *made, "", "\\", "''", "\\'", "'\\", "a\\\\'\"'"]
    assert split_with_shell(shell, " ".join(map(shell_word, texts)), tmp_path) == texts


def test_quotes_of_powershell() -> None:
    assert powershell_word("it's \u2018x\u2019 $(y)") == "'it''s \u2018\u2018x\u2019\u2019 $(y)'"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("zed x", "`ollama pull 'zed x'`"),
        ("zed$(touch ran)", "`ollama pull 'zed$(touch ran)'`"),
        ("zed'x", "`ollama pull 'zed'\"'\"'x'`"),
        ("-rf", "`ollama pull MODEL` (MODEL left out: not safe to paste)"),
        ("zed\nx", "`ollama pull MODEL` (MODEL left out: not safe to paste)"),
        ("\x1b[2J", "`ollama pull MODEL` (MODEL left out: not safe to paste)"),
        ("zed\u202ex", "`ollama pull MODEL` (MODEL left out: not safe to paste)"),
        ("", "`ollama pull MODEL` (MODEL left out: not safe to paste)"),
        ("x" * 301, "`ollama pull MODEL` (MODEL left out: not safe to paste)"),
    ],
)
def test_a_command_for_a_person(name: str, line: str) -> None:
    assert paste_command("ollama pull {MODEL}", MODEL=name) == line


@given(ANY_NAME)
def test_a_command_is_one_line_that_a_terminal_shows_as_it_is(name: str) -> None:
    assert paste_command("gpumesh models pull {MODEL} --node {NODE}", MODEL=name, NODE=name).isprintable()


@given(ANY_NAME)
def test_mesh_yaml_is_read_as_the_same_text_and_no_variable_is_expanded(name: str) -> None:
    quoted = yaml_text(name)
    for text in (f"a: {quoted}   # a comment", f"a: [{quoted}, {quoted}]", f'{{"a": {quoted}}}'):
        tree, faults = yaml_tree.parse_yaml(text)
        assert tree is not None
        values, more = variable_expansion.expand_tree(tree, {"HOME": "expanded", "GPUMESH_API_KEY": "secret"})
        assert more == []
        if faults:  # mesh.yaml takes no such text, however it is written
            assert "has no place in a setting" in faults[0].message
            assert not set(name).isdisjoint("\x00\x1b\x7f\x85\x9b")
        else:
            assert values["a"] in (name, [name, name])
    assert yaml.safe_load(quoted) == json.loads(quoted) == name.replace("${", "$${")


# -- new places ------------------------------------------------------------------------------------------------------

_SAFE = {"paste_command", "shell_word", "shell_words", "powershell_word", "yaml_text"}
_COMMAND = re.compile(
    r"\b(?:gpumesh [a-z-]+ |ssh -|ssh-keyscan |ssh-keygen |curl |ollama [a-z]+ |chmod |export |ls -|rm |set -gx |kill )"
    r"[^\n.:;]*\0"
)
# What is put in there can be nothing else than a word of ours, or one whose form mesh.yaml's reader has checked.
_CHECKED = {
    ("audit/tunnel.py", "try it by hand: \0"),
    ("batches/engine.py", "gpumesh was killed \0 times while this request was under way"),
    ("gateway/batches/file_routes.py", "`gpumesh batch rm \0` does that now"),  # an id that our store has made
    ("gateway/batches/upload.py", "purpose is required: it is `\0`"),
    ("gateway/batches/upload.py", "purpose is `\0`: files are kept here for batches only"),
    ("gateway/body_parsers/upload_form.py", "the form has `\0` twice"),
    ("gateway/body_parsers/upload_form.py", "`\0` is plain text, and only `\0` is a file"),
    ("gateway/body_parsers/upload_form.py", "`\0` is too long"),
    ("gateway/body_parsers/upload_form.py", "`\0`"),
    ("backends/continuation/chat_streams.py", "an answer with `\0` cannot be continued"),
    ("backends/continuation/ollama_streams.py", "an answer with `\0` cannot be continued"),
    ("cli/commands/audit.py", "gpumesh audit, \0: \0"),
    ("cli/commands/demo.py", "→ gpumesh run \0: \0 tokens from \0\0"),
    ("cli/commands/demo.py", "  OLLAMA_HOST=Q ollama run \0"),
    ("cli/commands/env.py", "set -gx \0 Q;"),
    ("cli/commands/env.py", "export \0=Q"),
    ("cli/commands/env.py", 'set -gx \0 "$\0";'),
    ("cli/commands/env.py", 'export \0="$\0"'),
    (
        "cli/commands/env.py",
        "the gateway asks for a key, and no variable of mesh.yaml holds one here: `export \0=…`, then again",
    ),
    ("cli/commands/init.py", "wrote \0; try it: gpumesh run\0 'Hello'"),
    ("cli/commands/init.py", "wrote \0; when a server is there: gpumesh audit\0"),
    ("cli/commands/models.py", "--json and -o belong behind the command: gpumesh models \0 …"),
    ("cli/commands/pool.py", "--json and -o belong behind the command: gpumesh pool \0 …"),
    ("cli/commands/ui.py", "ssh -L \0:127.0.0.1:\0 THIS_MACHINE"),  # the gateway's port
    ("cli/init/host_input.py", "what you typed: gpumesh init \0"),  # words of ``shell_word``
    # Commands with the name of a service, which ``is_valid_name`` has checked.
    ("cli/views/service_status.py", "`\0`, `gpumesh logs`"),
    (
        "cli/views/service_status.py",
        "the service \0 keeps the mesh of \0 up, with \0: \0, and `\0` and `gpumesh logs` show its log",
    ),
    (
        "cli/views/service_status.py",
        "mesh.yaml names \0, and a service has only what \0 says (NAME=value lines, mode 0600): add them there and "
        "`\0`, or set them here and `gpumesh service install --save-variables`",
    ),
    ("config/advice.py", "export \0=… before `gpumesh up`"),
    ("config/advice.py", "`{node: \0, memory: 8GiB}` lets it take part with its CPU"),
    ("config/credentials.py", "set it before starting gpumesh, for example: export \0=…"),
    ("config/value_parsers.py", "holds a port as well: write `port: \0` apart"),
    ("config/mesh_file/error_messages.py", "; such as `\0`"),
    ("config/mesh_file/pool_rules.py", "pools are a list: write `- name: \0`"),
    ("config/mesh_file/rules.py", "nodes are a list: write `- name: \0`"),
    ("gateway/body_parsers/json_members.py", "the request body has `\0` twice"),
    ("lab/vllm.py", "The model `\0` does not exist."),  # as vLLM itself says it
    ("pools/gguf/attention.py", "gpumesh does not know how much memory the cache of the architecture \0 needs"),
    ("pools/hosts/commands.py", 'rm -f "\0/unfinished-$1"'),  # a folder of ours on the host, in a shell variable
    ("probes/wrong_server.py", "write `backend: {url: \0://\0:PORT}`, as the host knows it"),
    ("text/quoting.py", "`\0`"),
    ("tunnels/workers/zygote.py", "gpumesh tunnel \0"),
}


def test_commands_with_values_are_made_by_quoting_py() -> None:
    """A new f-string with a command around a value comes here: take ``quoting.paste_command``, or say above why not."""
    wrong = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(map(_part, node.values))
                if _COMMAND.search(text) or any("\0" in part for part in text.split("`")[1::2]):
                    wrong.add((path.relative_to(PACKAGE).as_posix(), text))
    assert wrong - _CHECKED == set()


def test_all_quoting_is_done_by_quoting_py() -> None:
    """``shlex.quote`` is not enough for fish; on the host and in files of ours a POSIX shell reads what it quotes."""
    allowed = {
        "text/quoting.py",
        "pools/hosts/paths.py",
        "tunnels/remote_commands/remote_command.py",
        "tunnels/supervisor.py",
        "tunnels/openssh/prompts.py",
    }
    allowed.add("probes/commands/combined_commands.py")
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in allowed and not name.startswith("lab/"):
            assert not re.search(
                r"shlex\.(quote|join)|shell=True|create_subprocess_shell|os\.system", path.read_text()
            ), name


def _part(value: ast.expr) -> str:
    if isinstance(value, ast.Constant):
        return str(value.value)
    assert isinstance(value, ast.FormattedValue)
    called = value.value.func if isinstance(value.value, ast.Call) else None
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    return "Q" if name in _SAFE else "\0"
