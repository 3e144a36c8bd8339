#!/usr/bin/env python3
"""Where a vast.ai instance's sshd is today, for a node's `address_from`: prints `host port`.

    vast-address.py vastai show instance ID --raw     reads the instance's JSON from what a command prints
    vast-address.py < instance.json                   reads it from stdin

The direct address is used where the instance has one, else vast.ai's proxy. While it starts it has neither: then this
says so and exits with 1, and gpumesh asks again. Needs nothing but Python, so it can be copied beside any mesh.yaml.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

TIMEOUT_S = 15  # less than address_from's own 20 s, so that the reason is said here


def address(instance: Any) -> tuple[str, int]:
    """Host and port of sshd. Raises ValueError, with the reason, while the instance has none."""
    if isinstance(instance, dict) and "instances" in instance:
        instance = instance["instances"]  # as the REST API wraps it
    if isinstance(instance, list) and len(instance) == 1:
        instance = instance[0]
    if not isinstance(instance, dict):
        raise ValueError("this is not one instance: name it, as in `vastai show instance ID --raw`")  # noqa: TRY004
    return _direct(instance) or _proxy(instance)


def _direct(instance: dict[str, Any]) -> tuple[str, int] | None:
    """`ports` is a dict when ports are mapped; null, or a list, when none are."""
    host, ports = str(instance.get("public_ipaddr") or "").strip(), instance.get("ports")
    mapped = ports.get("22/tcp") if isinstance(ports, dict) else None
    if not host or not mapped:
        return None
    return host, int(mapped[0]["HostPort"])


def _proxy(instance: dict[str, Any]) -> tuple[str, int]:
    host, port = instance.get("ssh_host"), instance.get("ssh_port")
    if not host or not port:
        raise ValueError(f"the instance has no address yet (it is {instance.get('actual_status') or 'starting'})")
    # An image that runs Jupyter keeps the proxy's port for it; sshd has the next one.
    return str(host), int(port) + ("jupyter" in str(instance.get("image_runtype") or ""))


def main(command: list[str]) -> int:
    try:
        if command:
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_S)
            host, port = address(json.loads(done.stdout))
        else:
            host, port = address(json.load(sys.stdin))
    except (ValueError, LookupError, TypeError, OSError, subprocess.SubprocessError) as error:
        print(f"vast-address: {error}", file=sys.stderr)
        return 1
    print(host, port)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
