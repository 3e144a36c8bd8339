from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.config.ssh import key_files
from gpumesh.state import Severity
from gpumesh.topology import (
    AddressCommand,
    BackendSpec,
    GatewaySpec,
    KeySpec,
    NodeSpec,
    RedisSpec,
    SshSpec,
    Target,
    Topology,
    TransportKind,
)
from tests.config import build


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SshSpec:
    """Nothing to remark on."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.delenv("UNSET", raising=False)
    (tmp_path / ".ssh").mkdir()
    (tmp_path / "known_hosts").write_text("")
    return SshSpec("h", identity_files=(write_key(tmp_path / "key"),), known_hosts=tmp_path / "known_hosts")


def write_key(path: Path, text: bytes = b"-----BEGIN RSA PRIVATE KEY-----\n") -> Path:
    path.write_bytes(text)
    path.chmod(0o600)
    return path


def codes(ssh: SshSpec | None, **node: object) -> list[str]:
    spec = NodeSpec("a", BackendSpec(), ssh)
    return [finding.code for finding in config.check(Topology("m", (replace(spec, **node),)))]  # type: ignore[arg-type]


def test_nothing_to_say(ssh: SshSpec) -> None:
    assert codes(ssh) == []
    assert codes(None) == []


def test_variables_that_are_not_set(ssh: SshSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    assert codes(replace(ssh, password_env="UNSET", passphrase_env="UNSET")) == ["secret-missing"] * 2
    assert codes(None, backend=BackendSpec(api_key_env="UNSET")) == ["secret-missing"]
    monkeypatch.setenv("IS_SET", "x")
    assert codes(replace(ssh, password_env="IS_SET")) == []
    mesh = Topology(
        "m",
        (NodeSpec("a", BackendSpec()),),
        GatewaySpec(host="0.0.0.0", api_key_env="UNSET"),
        RedisSpec("redis://127.0.0.1", "UNSET", sentinel_password_env="UNSET"),
    )
    assert [finding.code for finding in config.check(mesh)] == [
        "secret-missing",
        "plain-http",
        *["secret-missing"] * 2,
    ]


@pytest.mark.parametrize(
    ("url", "ca_file", "name", "expected"),
    [
        ("redis://localhost:6379/0", None, "home", []),
        ("redis://[::1]", None, "home", []),
        ("unix:///run/redis.sock", None, "home", []),
        ("redis://me@redis.example.com:6379", None, "home", ["redis-plain"]),
        ("redis+sentinel://127.0.0.1,h:26379/mesh", None, "home", ["redis-plain"]),
        ("rediss+sentinel://h,i/mesh", None, "home", []),
        ("rediss://h", "ca.pem", "home", []),
        ("rediss://h", "none.pem", "home", ["redis-ca"]),
        ("redis://localhost", "ca.pem", "home", ["redis-ca"]),
        ("redis://localhost", None, "mesh", ["redis-name"]),
    ],
)
def test_redis(url: str, ca_file: str | None, name: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("x")
    redis = RedisSpec(url, ca_file=None if ca_file is None else str(tmp_path / ca_file))
    mesh = Topology(name, (NodeSpec("a", BackendSpec()),), redis=redis)
    findings = config.check(mesh)
    assert [finding.code for finding in findings] == expected
    assert all("me@" not in finding.message for finding in findings)


def test_keys(ssh: SshSpec, tmp_path: Path) -> None:
    assert codes(replace(ssh, identity_files=(tmp_path / "none",))) == ["key-unreadable"]
    assert codes(replace(ssh, identity_files=(tmp_path,))) == ["key-unreadable"]
    public = write_key(tmp_path / "key.pub", b"ssh-ed25519 AAAA")
    assert codes(replace(ssh, identity_files=(public,))) == ["key-unreadable"]
    ssh.identity_files[0].chmod(0o644)
    assert codes(ssh) == ["key-open"]
    ssh.identity_files[0].chmod(0o600)
    (tmp_path / "key-cert.pub").write_text("x")  # either transport sends it
    assert codes(ssh) == []
    assert codes(replace(ssh, identity_files=())) == ["no-credentials"]
    assert codes(replace(ssh, identity_files=(), transport=TransportKind.OPENSSH)) == []


def test_a_key_on_a_token_is_known_by_its_public_part(ssh: SshSpec, tmp_path: Path) -> None:
    blob = base64.encodebytes(b"openssh-key-v1\0....sk-ssh-ed25519@openssh.com....")
    armour = b"-----BEGIN OPENSSH PRIVATE KEY-----\n%s-----END OPENSSH PRIVATE KEY-----\n"
    token = write_key(tmp_path / "token", armour % blob)
    assert key_files.detect_key_kind(token) is key_files.KeyKind.FIDO
    assert codes(replace(ssh, identity_files=(token,))) == ["transport-unsupported"]
    assert codes(replace(ssh, identity_files=(token,), transport=TransportKind.OPENSSH)) == []
    assert key_files.detect_key_kind(write_key(tmp_path / "broken", armour % b"!!!\n")) is key_files.KeyKind.PRIVATE
    assert key_files.detect_key_kind(write_key(tmp_path / "empty", b"")) is key_files.KeyKind.PRIVATE


def test_hosts(ssh: SshSpec, tmp_path: Path) -> None:
    assert codes(replace(ssh, host="ssh.runpod.io")) == ["transport-unsupported"]
    assert codes(replace(ssh, host="EU.ssh.runpod.io.", transport=TransportKind.OPENSSH)) == ["transport-unsupported"]
    assert codes(replace(ssh, host="ssh.runpod.io.example")) == []
    assert codes(replace(ssh, known_hosts=tmp_path / "none")) == ["host-key-unknown"]
    assert codes(replace(ssh, address_from=AddressCommand(("/no/such/program",)))) == ["address-from"]


@pytest.mark.parametrize(("jump", "advice"), [((), "records it"), (("ada@gate", "inner"), "those of the jump hosts")])
def test_how_a_key_comes_to_be_known(ssh: SshSpec, tmp_path: Path, jump: tuple[str, ...], advice: str) -> None:
    spec = replace(ssh, known_hosts=tmp_path / "none", proxy_jump=jump)
    (finding,) = config.check(Topology("m", (NodeSpec("a", BackendSpec(), spec),)))
    assert "gpumesh trust a" in (finding.hint or "")
    assert advice in (finding.hint or "")


def test_aliases(ssh: SshSpec, tmp_path: Path) -> None:
    (tmp_path / ".ssh" / "config").write_text("Host jump\n  ProxyCommand x\nHost bad\n  ProxyJump bad\n")
    openssh = replace(ssh, transport=TransportKind.OPENSSH)
    mesh = Topology("m", (NodeSpec("a", BackendSpec(), replace(openssh, alias="jump")),))
    (finding,) = config.check(mesh)
    assert (finding.code, finding.severity) == ("alias-needs-openssh", Severity.INFO)
    (finding,) = config.check(replace(mesh, nodes=(NodeSpec("a", BackendSpec(), replace(ssh, alias="jump")),)))
    assert (finding.code, finding.severity) == ("alias-needs-openssh", Severity.WARNING)
    assert codes(replace(ssh, alias="nowhere")) == ["alias-unknown"]
    assert codes(replace(ssh, alias="bad")) == ["alias-unreadable"]


def test_two_names_for_one_server() -> None:
    def direct(name: str, host: str) -> NodeSpec:
        return NodeSpec(name, BackendSpec(targets=(Target(host, 1),)))

    mesh = Topology("m", (direct("a", "127.0.0.1"), direct("b", "localhost"), direct("c", "x")))
    (finding,) = config.check(mesh)
    assert (finding.code, finding.nodes) == ("tunnel-duplicate", ("a", "b"))
    assert config.check(replace(mesh, nodes=(mesh.nodes[0], replace(mesh.nodes[1], enabled=False)))) == []


def test_a_node_that_names_one_server_twice_shares_it_with_no_other_node() -> None:
    node = NodeSpec("a", BackendSpec(targets=(Target("localhost", 1), Target("127.0.0.1", 1))))
    assert config.check(Topology("m", (node,))) == []
    (finding,) = config.check(Topology("m", (node, replace(node, name="b"))))
    assert finding.message == "a and b both name http://127.0.0.1:1"


def test_nothing_enabled() -> None:
    assert codes(None, enabled=False) == ["no-node"]


def test_a_public_key_needs_an_agent(ssh: SshSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its private key may be on a YubiKey or in 1Password. Everybody may read a public key."""
    public = write_key(tmp_path / "id.pub", b"ssh-ed25519 AAAA me\n")
    public.chmod(0o644)
    named = replace(ssh, identity_files=(public,))
    assert codes(named) == ["key-unreadable"]
    monkeypatch.setenv("SSH_AUTH_SOCK", "/agent")
    assert codes(named) == []
    assert codes(replace(named, agent=False)) == ["key-unreadable"]


def test_the_file_with_the_key_of_a_client(ssh: SshSpec, tmp_path: Path) -> None:
    file = tmp_path / "guest.key"

    def findings() -> list[tuple[str, Severity]]:
        spec = GatewaySpec(keys=(KeySpec("guest", file=file),))
        mesh = Topology("m", (NodeSpec("n", BackendSpec(), ssh),), spec)
        return [(finding.code, finding.severity) for finding in config.check(mesh)]

    assert findings() == [("secret-missing", Severity.ERROR)]
    write_key(file, b"sk-0123456789abcdef")
    assert findings() == []
    file.chmod(0o644)
    assert findings() == [("key-open", Severity.WARNING)]


def test_nodes_of_a_pool_that_can_hold_no_layers() -> None:
    mesh = build.topology(
        "nodes:\n"
        "- {name: off, backend: {url: 'http://127.0.0.1:1'}, enabled: false}\n"
        "- {name: cpu, backend: {url: 'http://127.0.0.1:2'}, expect: {gpus: 0}}\n"
        "pools:\n"
        "- {name: big, model: m, nodes: [off, cpu]}\n"
        "- {name: fine, model: m, nodes: [{node: cpu, memory: 8GiB}]}\n"
    )
    findings = [finding for finding in config.check(mesh) if finding.code == "pool-node-unusable"]
    assert [(finding.node, finding.message) for finding in findings] == [
        ("off", "the pool big uses off, which has `enabled: false`"),
        ("cpu", "the pool big uses cpu, which is expected to have no GPU"),
    ]
