"""What a person is told about a mesh.yaml that is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.config.mesh_file import reader
from gpumesh.errors import ConfigError, ExitCode
from tests.config.build import DIRECT, problem, problems, topology


def with_ssh(text: str) -> str:
    return f"nodes:\n- name: a\n  ssh: {text}\n"


def with_backend(text: str) -> str:
    return f"nodes:\n- name: a\n  ssh: {{host: h}}\n  backend: {text}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "mesh.yaml: is empty"),
        ("# only a comment\n", "mesh.yaml: is empty"),
        ("[]", "mesh.yaml:1:1: keys with values are expected at the top, such as `nodes:`"),
        ("hello", "mesh.yaml:1:1: keys with values are expected at the top, such as `nodes:`"),
        ("name: x", "mesh.yaml:1:1: nodes: names no node"),
        ("nodes:", "mesh.yaml:1:1: nodes: names no node"),
        ("nodes: []", "mesh.yaml:1:1: nodes: names no node"),
        ("nodes: {iceland: {}}", "mesh.yaml:1:1: nodes: nodes are a list: write `- name: iceland`"),
        ("nodes: 3", "mesh.yaml:1:8: nodes: a list is expected here, not the text '3'"),
        (with_ssh("{host: h, port: 99999}"), "mesh.yaml:3:24: nodes[0].ssh.port: '99999' is not between 1 and 65535"),
        (with_ssh("{host: h, port: 0}"), "'0' is not between 1 and 65535"),
        (with_ssh("{host: h, port: 22.5}"), "'22.5' is not a whole number"),
        (with_ssh("{host: h, port: [22]}"), "a whole number is expected here, not a list"),
        (with_ssh("{host: h, prot: 22}"), "nodes[0].ssh.prot: unknown key 'prot'; did you mean port?"),
        (with_ssh("{host: h, hostname: h}"), "unknown key 'hostname'; did you mean host?"),
        (with_ssh("{host: h, Identity-File: x}"), "unknown key 'Identity-File'; did you mean identity_file?"),
        (with_ssh("{host: h, weight: 2}"), "unknown key 'weight'; weight belongs under a node"),
        (with_ssh("{host: h, url: x}"), "unknown key 'url'; url belongs under"),
        (
            with_ssh("{host: h, transport: sshtunel}"),
            "'sshtunel' is not one of sshtunnel, openssh; did you mean sshtunnel?",
        ),
        (with_ssh("{host: h, agent: maybe}"), "'maybe' is neither true nor false"),
        (with_ssh("{host: root@h}"), "'root@h' holds a user as well: write `user:` apart"),
        (with_ssh("{host: 'h:22'}"), "'h:22' holds a port as well: write `port: 22` apart"),
        (with_ssh("{host: '-oProxyCommand=x'}"), "is neither a host name nor an address"),
        (with_ssh("{host: h, user: -l}"), "'-l' is not a user's name"),
        (with_ssh("{alias: '-F/x'}"), "'-F/x' is not the name of a Host"),
        (with_ssh("{host: h, connect_timeout: 5}"), "'5' has no unit: write 5s for seconds"),
        (with_ssh("{host: h, connect_timeout: soon}"), "'soon' is not a duration: write 500ms, 5s or 2m"),
        (with_ssh("{host: h, connect_timeout: 9h}"), "'9h' is not between 100ms and 5m"),
        (with_ssh("{host: h, proxy_jump: 'a, b:x'}"), "is not [user@]host[:port]"),
        (with_ssh("{host: h, identity_file: ~bob/key}"), "names another user's home: write the whole path"),
        (with_ssh("{}"), "nodes[0].ssh: does not say which host"),
        (with_ssh("root@h"), "nodes[0].ssh: keys with values are expected here, not the text 'root@h'; such as `{host"),
        ("nodes:\n- name: a\n", "nodes[0]: has neither `ssh` nor a URL"),
        (
            "nodes:\n- name: a\n  backend: {port: 80}\n",
            "nodes[0].backend.port: a port is meant as seen from an ssh host",
        ),
        ("nodes:\n- {backend: {url: 'http://h'}}\n", "nodes[0].name: is missing"),
        ("nodes:\n- {name: 'a b', backend: {url: 'http://h'}}\n", "'a b' is not a name"),
        (with_backend("{port: 80, url: 'http://h'}"), "nodes[0].backend.url: port stands here already: give one of"),
        (with_backend("{urls: []}"), "nodes[0].backend.urls: names no URL"),
        (with_backend("{kind: openai}"), "servers of kind openai have no usual port"),
        (with_backend("{url: 'localhost:80'}"), "'localhost:80' is not a URL: write it like http://127.0.0.1:11434"),
        (with_backend("{url: 'http://h:0'}"), "has port 0"),
        (with_backend("{url: 'http://h:99999'}"), "the port or the address in it cannot be read"),
        (with_backend("{max_parallel: 0}"), "'0' is not between 1 and 4096"),
        ("version: 2\n" + DIRECT, "mesh.yaml:1:10: version: '2' is not 1, which is all that is known here"),
        ("gateway: {listen: 127.0.0.1}\n" + DIRECT, "gateway.listen: '127.0.0.1' is not HOST:PORT"),
        ("gateway: {listen: ':80'}\n" + DIRECT, "does not say on which address: write 127.0.0.1:80, or 0.0.0.0:80"),
        (
            "gateway: {listen: '0.0.0.0:80'}\n" + DIRECT,
            "lets other machines use your GPUs, and no API key is asked for",
        ),
        ("gateway: {listen: 'box:80'}\n" + DIRECT, "listening on box lets other machines"),
        ("gateway: {listen: '[::]:80'}\n" + DIRECT, "listening on :: lets other machines"),
        (
            "gateway: {policy: fair}\n" + DIRECT,
            "'fair' is not one of round-robin, least-loaded, power-of-two, adaptive",
        ),
        ("redis: {url: 'http://x'}\n" + DIRECT, "is not Redis's URL"),
        ("redis: {}\n" + DIRECT, "redis.url: is missing"),
        (DIRECT + "- name: local\n  backend: {url: 'http://h'}\n", "'local' is the name of nodes[0] already"),
        (DIRECT + "  weight: 0\n", "'0' is not more than 0 and at most 1000"),
        (DIRECT + "  weight: .nan\n", "'.nan' is not a number"),
        (DIRECT + "  eur_per_hour: -1\n", "'-1' is not a price such as 0.34"),
        (DIRECT + "  eur_per_hour: 10001\n", "'10001' is not between 0 and 10000"),
        (DIRECT + "  name: x\n", "nodes[0].name: this key is given twice; it stands on line 2 already"),
        (DIRECT + "  address_from: {command: 'a \"b'}\n  ssh: {}\n", "has a quote that is not closed"),
        (DIRECT + "  address_from: {command: []}\n", "this names no program"),
        (DIRECT + "  labels: {a: [b]}\n", "nodes[0].labels.a: a single value is expected here, not a list"),
        ("nodes:\n\t- name: a\n", "mesh.yaml:2:1: a tab indents this line: YAML allows only spaces there"),
    ],
)
def test_one_problem(text: str, said: str) -> None:
    assert said in problem(text)


@pytest.mark.parametrize("key", ["password", "Password", "passphrase", "api_key", "apikey", "ssh-password", "token"])
def test_a_secret_in_the_file_is_told_apart_and_never_repeated(key: str) -> None:
    said = problem(with_ssh(f"{{host: h, {key}: hunter2}}"))
    assert "a secret may not stand in the file" in said
    assert "_env" in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    "text",
    [
        with_ssh("{host: h, password_env: hunter2-hunter2}"),
        with_backend("{api_key_env: sk-hunter2}"),
        with_backend("{url: 'http://bob:hunter2@h'}"),
        "redis: {url: 'redis://:hunter2@h'}\n" + DIRECT,
    ],
)
def test_a_secret_in_a_value_is_never_repeated(text: str) -> None:
    said = problem(text)
    assert "hunter2" not in said
    assert "variable" in said


def test_values_from_variables_are_never_repeated() -> None:
    said = problem(with_ssh("{host: h, port: '${PORT}'}"), env={"PORT": "hunter2"})
    assert "'${PORT}' is not a whole number" in said
    assert "hunter2" not in said


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    said = problems(
        "nam: home\n"
        "gateway: {listen: '0.0.0.0:1', polcy: adaptive}\n"
        "defaults: {ssh: {port: 99999}}\n"
        "nodes:\n"
        "- name: a\n"
        "  ssh: {host: '${NOWHERE}', port: x}\n"
        "- name: a\n"
        "  backend: {port: 1, url: 'http://h'}\n"
        "  weight: -1\n"
    )
    assert [int(line.split(":")[1]) for line in said] == [1, 2, 2, 3, 6, 6, 7, 8, 8, 9]
    assert [line.split(": ")[1] for line in said] == [
        "nam",
        "gateway.listen",
        "gateway.polcy",
        "defaults.ssh.port",
        "nodes[0].ssh.host",
        "nodes[0].ssh.port",
        "nodes[1].name",
        "nodes[1].backend.port",
        "nodes[1].backend.url",
        "nodes[1].weight",
    ]


def test_a_problem_of_the_defaults_is_told_once_whatever_the_number_of_nodes() -> None:
    nodes = "".join(f"- {{name: n{n}, ssh: {{host: h{n}}}}}\n" for n in range(20))
    assert len(problems("defaults: {ssh: {prot: 1}}\nnodes:\n" + nodes)) == 1


def test_fifty_errors_make_one_report() -> None:
    nodes = "".join(f"- {{name: n{n}, ssh: {{host: h, port: {70000 + n}}}}}\n" for n in range(50))
    with pytest.raises(ConfigError) as caught:
        topology("nodes:\n" + nodes)
    assert len(caught.value.problems) == 50
    assert caught.value.exit_code is ExitCode.USAGE
    assert str(caught.value).count("\n") == 49
    assert [problem.line for problem in caught.value.problems] == list(range(2, 52))


def test_thousands_of_errors_are_cut_short() -> None:
    nodes = "".join(f"- {{name: n{n}, ssh: {{host: h, port: x}}}}\n" for n in range(900))
    said = problems("nodes:\n" + nodes)
    assert len(said) == reader.MAX_PROBLEMS + 1
    assert said[-1] == "mesh.yaml: and 800 more problems"


def test_an_alias_s_problem_is_told_where_the_alias_stands() -> None:
    def refuse(alias: str) -> None:
        raise ValueError(f"`ssh -G {alias}` failed: Bad configuration option: foo")

    said = problem(with_ssh("{alias: gpu1}"), resolve_alias=refuse)
    assert said.startswith("mesh.yaml:3:9: nodes[0].ssh.alias: `ssh -G gpu1` failed")


# -- files -----------------------------------------------------------------------------------------------------------


def load_problem(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        reader.load(path)
    (only,) = caught.value.problems
    return str(only)


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_bytes("name: x\nnodes: # für".encode("latin-1"))
    assert ":2:11: byte 0xfc is not UTF-8: save it as UTF-8" in load_problem(path)
    path.write_bytes("name: x".encode("utf-16"))
    assert "is UTF-16: save it as UTF-8" in load_problem(path)


def test_a_file_that_is_no_file(tmp_path: Path) -> None:
    assert "is not a file that can be read as text" in load_problem(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file that can be read as text" in load_problem(tmp_path / "pipe")
    assert "cannot be read: No such file or directory" in load_problem(tmp_path / "none")
    assert "is not a file that can be read as text" in load_problem(Path("/dev/zero"))


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_bytes(b"#" * (reader.MAX_BYTES + 1))
    assert "is larger than" in load_problem(path)


def test_windows_line_ends_and_byte_order_marks_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + DIRECT.replace("\n", "\r\n").encode())
    assert config.load(path).nodes[0].name == "local"


def test_load_names_the_file_that_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mesh.yaml").write_text(DIRECT)
    assert config.load().source == tmp_path / "mesh.yaml"
    (tmp_path / "mesh.yaml").write_text("nodes: 3")
    with pytest.raises(ConfigError, match=r"^mesh\.yaml:1:8: "):
        config.load()
