"""Facts about GPU providers' SSH access, by the names of their hosts."""

from __future__ import annotations

EXPOSED_TCP_HINT = "use the pod's `SSH over exposed TCP`, like: ssh root@213.173.108.12 -p 17445"


def describe_terminal_proxy(host: str) -> str | None:
    """Describes ``host`` if it is a provider's proxy that gives people a terminal and forwards no ports; else ``None``.

    RunPod offers two kinds of SSH access to each pod, and shows ``ssh PODID-HASH@ssh.runpod.io`` first.
    """
    host = host.rstrip(".").lower()
    if host == "ssh.runpod.io" or host.endswith(".ssh.runpod.io"):
        return f"{host} is RunPod's proxy for people at terminals: it forwards no ports"
    return None
