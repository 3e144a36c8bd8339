"""What a mesh.yaml that is right comes to mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.config.ssh.ssh_config import AliasSettings
from gpumesh.topology import (
    AddressCommand,
    BackendKind,
    GatewaySpec,
    HostKeyPolicy,
    PolicyKind,
    RedisSpec,
    SshSpec,
    Target,
    Topology,
    TransportKind,
    TunnelListen,
    TunnelsSpec,
)
from tests.config.build import DIRECT, HOME, node, problem, ssh, topology


@pytest.mark.parametrize(
    ("listen", "host", "port", "socket"),
    [
        ("8080", "127.0.0.1", 8080, None),
        ("[8080]", "127.0.0.1", 8080, None),
        ("unix:/run/x.sock", None, 11430, "/run/x.sock"),
        ("unix:~/x.sock", None, 11430, str(HOME / "x.sock")),
        ("[unix:x.sock]", None, 11430, "/etc/gpumesh/x.sock"),
        ("['unix:${DIR}/x.sock', '[::1]:0']", "::1", 0, "/run/user/1000/x.sock"),
    ],
)
def test_where_the_gateway_listens(listen: str, host: str | None, port: int, socket: str | None) -> None:
    mesh = topology(
        f"gateway: {{listen: {listen}}}\n" + DIRECT,
        source=Path("/etc/gpumesh/mesh.yaml"),
        env={"DIR": "/run/user/1000"},
    )
    spec = mesh.gateway
    assert (spec.host, spec.port, spec.socket) == (host, port, None if socket is None else Path(socket))
    assert parse_again(mesh).gateway == spec


def parse_again(mesh: Topology) -> Topology:
    """What `config show` prints, read back."""
    return config.parse(config.dump_effective(mesh), file="shown", env={}, home=HOME)


def test_who_may_use_the_tunnels() -> None:
    assert topology(DIRECT).tunnels == TunnelsSpec(share=False, listen=TunnelListen.TCP)
    shared = topology("tunnels: {share: true}\n" + DIRECT)
    assert shared.tunnels == TunnelsSpec(share=True)
    unix = topology("tunnels: {share: false, listen: unix}\n" + DIRECT)
    assert unix.tunnels == TunnelsSpec(listen=TunnelListen.UNIX)
    for mesh in (shared, unix):
        assert parse_again(mesh).tunnels == mesh.tunnels


def test_three_lines_are_enough() -> None:
    mesh = topology("nodes:\n- name: iceland\n  ssh: {host: 209.170.80.132, port: 13323, user: root}\n")
    assert mesh.name == "mesh"
    assert mesh.gateway == GatewaySpec()
    (iceland,) = mesh.nodes
    assert iceland.ssh == SshSpec("209.170.80.132", 13323, "root", known_hosts=HOME / ".ssh/known_hosts")
    assert iceland.backend.targets == (Target("127.0.0.1", 11434),)
    assert iceland.backend.kind is BackendKind.AUTO


def test_everything_that_can_be_said() -> None:
    mesh = topology(
        """
version: 1
name: home
gateway:
  listen: "[::]:0"
  api_key_env: KEY
  default_model: qwen2.5:7b
  policy: least-loaded
  max_queue: 0
  timeout: 1.5h
  cors_origins: [https://chat.example.com]
  access_log: off
nodes:
- name: a
  ssh:
    host: "[2001:db8::1]"
    port: 22
    user: ada
    identity_file: [~/.ssh/a, /b, c]
    known_hosts: ~/hosts
    host_key_policy: accept-new
    proxy_jump: ada@b:2222, c
    password_env: PW
    passphrase_env: PP
    agent: no
    transport: openssh
    connect_timeout: 500ms
    keepalive: 1m
  address_from: {command: ~/bin/where --pod 'my pod', timeout: 5s}
  backend: {kind: openai, url: "https://[::1]:8000/api/v1/", api_key_env: K, max_parallel: 4}
  expect: {hostname: 12e5, gpus: 0, gpu: NVIDIA GeForce RTX 4090, vram_mib: 24564, driver: 550, models: m}
  weight: .5
  labels: {where: on}
  enabled: false
redis: {url: 'rediss://gateway@localhost:6379/0', password_env: RP, ca_file: ca.pem, sentinel_password_env: SP}
""",
        source=Path("/etc/gpumesh/mesh.yaml"),
    )
    assert mesh.source == Path("/etc/gpumesh/mesh.yaml")
    assert mesh.gateway == GatewaySpec(
        "::",
        0,
        "KEY",
        "qwen2.5:7b",
        PolicyKind.LEAST_LOADED,
        0,
        5400.0,
        ("https://chat.example.com",),
        access_log=False,
    )
    (a,) = mesh.nodes
    assert a.ssh == SshSpec(
        host="2001:db8::1",
        port=22,
        user="ada",
        identity_files=(HOME / ".ssh/a", Path("/b"), Path("/etc/gpumesh/c")),
        known_hosts=HOME / "hosts",
        host_key_policy=HostKeyPolicy.ACCEPT_NEW,
        proxy_jump=("ada@b:2222", "c"),
        password_env="PW",
        passphrase_env="PP",
        agent=False,
        alias=None,
        transport=TransportKind.OPENSSH,
        connect_timeout_s=0.5,
        keepalive_s=60.0,
        address_from=AddressCommand((str(HOME / "bin/where"), "--pod", "my pod"), 5.0),
    )
    assert a.backend.targets == (Target("::1", 8000, "https", "/api"),)
    assert (a.backend.kind, a.backend.api_key_env, a.backend.max_parallel) == (BackendKind.OPENAI, "K", 4)
    assert a.expect.hostname == "12e5"
    assert (a.expect.gpus, a.expect.vram_mib, a.expect.driver, a.expect.models) == (0, 24564, "550", ("m",))
    assert (a.weight, dict(a.labels), a.enabled) == (0.5, {"where": "on"}, False)
    assert mesh.redis == RedisSpec("rediss://gateway@localhost:6379/0", "RP", "/etc/gpumesh/ca.pem", "SP")
    assert {"RP", "SP"} <= mesh.secret_variables


DEFAULTS = """
defaults:
  ssh: {user: root, port: 2222, identity_file: ~/.ssh/shared}
  backend: {kind: openai, port: 8000, max_parallel: 2}
  expect: {gpus: 1, gpu: A}
  labels: {a: 1, b: 1}
  weight: 2
"""


def test_defaults_are_merged_under_every_node() -> None:
    a, b = topology(
        DEFAULTS + "nodes:\n"
        "- {name: a, ssh: {host: h}}\n"
        "- name: b\n  ssh: {host: h, user: eve, port: 22}\n  backend: {urls: [http://h, http://h/]}\n"
        "  expect: {gpu: B}\n  labels: {b: 2}\n  weight: 1\n"
    ).nodes
    assert a.ssh is not None
    assert b.ssh is not None
    assert (a.ssh.user, a.ssh.port, a.ssh.identity_files) == ("root", 2222, (HOME / ".ssh/shared",))
    assert (b.ssh.user, b.ssh.port, b.ssh.identity_files) == ("eve", 22, (HOME / ".ssh/shared",))
    assert a.backend.targets == (Target("127.0.0.1", 8000),)
    assert b.backend.targets == (Target("h", 80),)
    assert (b.backend.kind, b.backend.max_parallel) == (BackendKind.OPENAI, 2)
    assert (b.expect.gpus, b.expect.gpu) == (1, "B")
    assert (dict(b.labels), a.weight, b.weight) == ({"a": "1", "b": "2"}, 2.0, 1.0)


def test_defaults_of_ssh_make_no_direct_node_an_ssh_node() -> None:
    assert topology(DEFAULTS + "nodes:\n- {name: a, backend: {url: 'http://h'}}\n").nodes[0].ssh is None


def test_where_a_backend_is_may_come_from_the_defaults() -> None:
    text = "defaults: {backend: {url: 'http://h:1'}}\nnodes:\n- name: a\n"
    assert topology(text).nodes[0].backend.targets == (Target("h", 1),)
    assert "a port is meant as seen from an ssh host" in problem(text.replace("url: 'http://h:1'", "port: 1"))


def test_a_user_that_is_not_named_is_the_one_that_ssh_would_take() -> None:
    assert ssh("{host: h}", env={"LOGNAME": "ada", "USER": "eve"}).user == "ada"
    assert ssh("{host: h}", env={"USER": "eve"}).user == "eve"
    assert ssh("{host: h}", env={}).user == "root"


def test_usual_keys_are_tried_where_nothing_to_log_in_with_is_named() -> None:
    from gpumesh.config.mesh_file import reader

    def keys(text: str) -> tuple[Path, ...]:
        mesh = reader.parse(
            "nodes:\n- {name: a, ssh: " + text + "}\n", file="f", env={}, home=HOME, identities=(Path("/usual"),)
        )
        spec = mesh.nodes[0].ssh
        assert spec is not None
        return spec.identity_files

    assert keys("{host: h}") == (Path("/usual"),)
    assert keys("{host: h, identity_file: /k}") == (Path("/k"),)
    assert keys("{host: h, identity_file: []}") == ()
    assert keys("{host: h, password_env: P}") == ()


def test_an_address_may_come_from_a_command_alone() -> None:
    spec = node("{name: a, address_from: {command: [where, '--pod']}}").ssh
    assert spec is not None
    assert spec.address_from == AddressCommand(("where", "--pod"), 20.0)
    assert spec.host == ""


# -- variables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("${HOST}", "h1"),
        ("x${HOST}y", "xh1y"),
        ("${NONE:-other}", "other"),
        ("${EMPTY:-other}", "other"),
        ("${HOST:-other}", "h1"),
        ("${HOST}${HOST}", "h1h1"),
    ],
)
def test_variables_are_expanded(text: str, host: str) -> None:
    assert ssh(f"{{host: '{text}'}}", env={"HOST": "h1", "EMPTY": ""}).host == host


def test_a_literal_dollar_stays() -> None:
    assert dict(node("{name: a, ssh: {host: h}, labels: {a: '$HOME $${X} $5'}}").labels) == {"a": "$HOME ${X} $5"}


def test_numbers_may_come_from_variables() -> None:
    assert ssh("{host: h, port: '${PORT}', agent: '${A}'}", env={"PORT": "22", "A": "no"}).port == 22


def test_what_a_variable_holds_is_not_expanded_again() -> None:
    assert dict(node("{name: a, ssh: {host: h}, labels: {a: '${A}'}}", env={"A": "${B}"}).labels) == {"a": "${B}"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("${NONE}", "the variable NONE is not set; ${NONE:-default} would say what to use then"),
        ("${", "write ${VAR} or ${VAR:-default}"),
        ("${}", "write ${VAR} or ${VAR:-default}"),
        ("${1a}", "write ${VAR} or ${VAR:-default}"),
        ("${A-b}", "write ${VAR} or ${VAR:-default}"),
        ("${RUNPOD_API_KEY}", "${RUNPOD_API_KEY} holds a secret by its name"),
        ("${DB_PASSWORD:-x}", "holds a secret by its name"),
        ("${BIG}", "expands to more than 8192 characters"),
    ],
)
def test_variables_that_cannot_be_expanded(text: str, said: str) -> None:
    env = {"RUNPOD_API_KEY": "hunter2", "DB_PASSWORD": "hunter2", "BIG": "x" * 9000}
    told = problem(f"nodes:\n- {{name: a, ssh: {{host: '{text}'}}}}\n", env=env)
    assert said in told
    assert "hunter2" not in told


# -- aliases ---------------------------------------------------------------------------------------------------------

ANSWER = AliasSettings("10.0.0.9", 2200, "ops", ("~/.ssh/ops", "/k"), "~/kh", ("b:1", "c"), ())


def test_an_alias_fills_in_what_the_node_does_not_say_and_holds_before_the_defaults() -> None:
    text = "defaults: {ssh: {user: root, identity_file: /x, keepalive: 9s}}\nnodes:\n- {name: a, ssh: {alias: gpu1}}\n"
    spec = topology(text, resolve_alias=lambda alias: ANSWER).nodes[0].ssh
    assert spec is not None
    assert (spec.alias, spec.host, spec.port, spec.user) == ("gpu1", "10.0.0.9", 2200, "ops")
    assert spec.identity_files == (HOME / ".ssh/ops", Path("/k"))
    assert (spec.known_hosts, spec.proxy_jump, spec.keepalive_s) == (HOME / "kh", ("b:1", "c"), 9.0)
    assert spec.transport is TransportKind.SSHTUNNEL


def test_the_node_s_own_words_hold_before_its_alias() -> None:
    spec = ssh("{alias: gpu1, user: eve, port: 1, identity_file: /mine}", resolve_alias=lambda alias: ANSWER)
    assert (spec.user, spec.port, spec.identity_files, spec.host) == ("eve", 1, (Path("/mine"),), "10.0.0.9")


def test_what_the_alias_is_silent_on_comes_from_the_defaults() -> None:
    text = "defaults: {ssh: {user: root}}\nnodes:\n- {name: a, ssh: {alias: gpu1}}\n"
    spec = topology(text, resolve_alias=lambda alias: AliasSettings("10.0.0.9")).nodes[0].ssh
    assert spec is not None
    assert (spec.user, spec.port) == ("root", 22)


def test_an_alias_that_needs_ssh_itself_gets_it_unless_told_otherwise() -> None:
    def proxied(alias: str) -> AliasSettings:
        return AliasSettings("h", openssh_features=("ProxyCommand",))

    assert ssh("{alias: a}", resolve_alias=proxied).transport is TransportKind.OPENSSH
    told = problem("nodes:\n- {name: a, ssh: {alias: a, transport: sshtunnel}}\n", resolve_alias=proxied)
    assert "nodes[0].ssh.transport: sshtunnel cannot run the ProxyCommand of 'a'" in told


def test_what_ssh_says_is_held_to_the_same_forms() -> None:
    told = problem(
        "nodes:\n- {name: a, ssh: {alias: a}}\n",
        resolve_alias=lambda alias: AliasSettings("h", user="-oProxyCommand=x"),
    )
    assert "nodes[0].ssh.alias: in ~/.ssh/config its user is not a user's name" in told


# -- the files that ship ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[3]


EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.yaml") if path.name != "fleet.yaml")


@pytest.mark.parametrize("path", [ROOT / "mesh.yaml", *EXAMPLES], ids=lambda p: p.name)
def test_every_mesh_yaml_that_ships_is_right(path: Path) -> None:
    mesh = config.parse(path.read_text(), file=path.name, env={}, home=HOME, source=path)
    assert mesh.nodes


def test_the_user_s_own_mesh() -> None:
    mesh = config.load(ROOT / "mesh.yaml")
    assert [node.name for node in mesh.nodes] == ["iceland", "local", "vengeance", "runpod"]
    iceland = mesh.node("iceland")
    assert iceland.ssh is not None
    assert (iceland.ssh.host, iceland.ssh.port, iceland.ssh.user) == ("209.170.80.132", 13323, "root")
    assert iceland.backend.targets == (Target("127.0.0.1", 80),)
    assert mesh.node("runpod").backend.targets == (Target("localhost", 11435), Target("localhost", 8081))
    assert mesh.node("local").ssh is None
