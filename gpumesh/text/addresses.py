"""Host names and addresses as text: whether a host is loopback, and how a host and its port are written. Pure."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at ``host``, judged by the text alone, without DNS.

    Only the name ``localhost`` is loopback: any other name may have another address tomorrow.
    """
    if host.rstrip(".").lower() == "localhost":  # ``localhost.`` is the same name, written with DNS's root
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # any other name
        return False


def format_address(host: str, port: int) -> str:
    """``host:port``, or ``[host]:port`` for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
