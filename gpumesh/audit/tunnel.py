"""The audit's rule about tunnels: nodes that cannot be reached, the reason, and a hint where the error has none.

Most errors have a hint of their own, from the code in ``tunnels`` that raises them. The hints here are for the others.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpumesh.errors import TunnelError
from gpumesh.state import Finding, NodeState, Severity, TunnelPhase
from gpumesh.text.quoting import paste_command
from gpumesh.topology import NodeSpec

# Errors that a person must mend. Each has a remedy of its own, so the finding keeps the error's code. Other errors
# become a finding with the code node-unreachable.
_OWN_CODES = frozenset(
    {
        "auth-refused",
        "forwarding-forbidden",
        "host-key-changed",
        "host-key-revoked",
        "host-key-unknown",
        "key-unreadable",
        "reverse-forward-refused",
        "secret-missing",
        "transport-unsupported",
    }
)
_HINTS = {  # by the error's code
    "host-unresolved": "check `ssh.host` in mesh.yaml, and this machine's DNS",
    "connect-refused": "nothing listens on that port: pods get a new one at each restart, check `ssh.port`",
    "connect-timeout": "check that the host runs, and that no firewall drops port and address",
    "host-unreachable": "check this machine's network, and that the address is still the host's",
    "not-ssh": "check `ssh.port`: another service listens there",
}
_PHASES_WITHOUT_FINDING = (TunnelPhase.IDLE, TunnelPhase.UP, TunnelPhase.CLOSED)  # no connection is wanted, or it works


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    """Yields one finding if the node's tunnel has failed: the last error of the tunnel, with a hint.

    No finding while the tunnel is up or not wanted, or before its first error.
    """
    tunnel = state.tunnel
    if tunnel.state in _PHASES_WITHOUT_FINDING or tunnel.last_error is None:
        return
    error_code = tunnel.error_code or TunnelError.code  # without a code of its own: ``tunnel``
    hint = tunnel.hint or _HINTS.get(error_code) or f"try it by hand: {_test_command(spec)}"
    if error_code in _OWN_CODES:
        finding_code = error_code
    elif spec.ssh is None and error_code == "connect-refused":
        finding_code = "backend-down"  # without SSH, the host itself refused the connection: only its server is missing
    else:
        finding_code = "node-unreachable"
    yield Finding(finding_code, Severity.ERROR, spec.name, tunnel.last_error, hint)


def _test_command(spec: NodeSpec) -> str:
    """Returns a command with which a person can test the connection to the node.

    For a direct node the command asks for Ollama's version: with other servers, even a 404 shows that the connection
    works.
    """
    if spec.ssh is None:
        # "URL" is a word for the person to replace. In practice each node of mesh.yaml has a target.
        url = f"{spec.backend.targets[0].url}/api/version" if spec.backend.targets else "URL"
        return paste_command("curl {URL}", URL=url)
    return paste_command("ssh -p {PORT} {HOST}", PORT=str(spec.ssh.port), HOST=f"{spec.ssh.user}@{spec.ssh.host}")
