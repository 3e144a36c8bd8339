from __future__ import annotations

from pathlib import Path

from gpumesh.cli.host_key_confirmation import explain_judgement
from gpumesh.tunnels.hostkeys import HostKeyCheck, HostKeyStatus
from gpumesh.tunnels.known_hosts import HostKey, KnownHost

HOST = KnownHost("1.2.3.4", 22, "iceland", "/home/ada/mesh.yaml")


def test_each_judgement_is_explained() -> None:
    known = Path("known_hosts")
    key = HostKey("ssh-ed25519", b"x")
    changed = "\n".join(explain_judgement(HostKeyCheck(HostKeyStatus.CHANGED, (key,)), known, HOST))
    assert key.fingerprint in changed
    assert "attack" not in changed  # nor is it hidden
    assert "in between" in changed
    authority = "\n".join(explain_judgement(HostKeyCheck(HostKeyStatus.UNKNOWN, certificate_only=True), known, HOST))
    assert "certificate authority" in authority
    assert "transport: openssh" in authority
    assert "Compare" in "\n".join(explain_judgement(HostKeyCheck(HostKeyStatus.UNKNOWN), known, HOST))
    shared = HostKeyCheck(HostKeyStatus.CHANGED, (key,), decided_by=HOST.shared_name)
    assert "another mesh.yaml" in "\n".join(explain_judgement(shared, known, HOST))
