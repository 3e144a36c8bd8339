"""GPU providers whose SSH proxies forward no ports (RunPod's ssh.runpod.io), recognized by the name of the host."""

from __future__ import annotations

EXPOSED_TCP_HINT = "use the pod's `SSH over exposed TCP`, like: ssh root@213.173.108.12 -p 17445"


def describe_terminal_proxy(host: str) -> str | None:
    """Returns a sentence if ``host`` is a provider's proxy that gives people a terminal and forwards no ports; else
    ``None``.

    RunPod offers two kinds of SSH access to each pod: such a proxy, and a port of the pod itself, which allows
    forwarding. RunPod's page shows the address of the proxy first, so people copy it: ``PODID-HASH@ssh.runpod.io``.
    """
    host = host.rstrip(".").lower()
    if host == "ssh.runpod.io" or host.endswith(".ssh.runpod.io"):
        return f"{host} is RunPod's proxy for people at terminals: it forwards no ports"
    return None
