"""What is known of providers' ways in, by the names of their hosts."""

from __future__ import annotations

EXPOSED_TCP_HINT = "use the pod's `SSH over exposed TCP`, like: ssh root@213.173.108.12 -p 17445"


def describe_terminal_proxy(host: str) -> str | None:
    """What ``host`` is, if it is a provider's proxy that gives people a terminal and forwards no ports; else ``None``.

    RunPod shows two ways to each pod, and ``ssh PODID-HASH@ssh.runpod.io`` comes first.
    """
    host = host.rstrip(".").lower()
    if host == "ssh.runpod.io" or host.endswith(".ssh.runpod.io"):
        return f"{host} is RunPod's proxy for people at terminals: it forwards no ports"
    return None
