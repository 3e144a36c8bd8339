#!/usr/bin/env python3
"""Where a RunPod pod's sshd is today, for a node's `address_from`: prints `host port`.

    runpod-address.py --pod POD_ID        asks RunPod's API, with the key in RUNPOD_API_KEY
    runpod-address.py COMMAND [ARG...]    reads the pod's JSON from what COMMAND prints
    runpod-address.py < pod.json          reads it from stdin

A pod's outside ports change whenever it resets, its address may, and while it starts it has neither: then this says so
and exits with 1, and gpumesh asks again. Needs nothing but Python, so it can be copied beside any mesh.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import urllib.parse
import urllib.request
from typing import Any

API = "https://rest.runpod.io/v1"
TIMEOUT_S = 15  # less than address_from's own 20 s, so that the reason is said here
SSH = "22"


def address(pod: Any) -> tuple[str, int]:
    """Host and port of `SSH over exposed TCP`. Raises ValueError, with the reason, while the pod has none."""
    if isinstance(pod, list) and len(pod) == 1:
        pod = pod[0]
    if not isinstance(pod, dict):
        raise ValueError("this is not one pod: a JSON object with publicIp and portMappings is expected")  # noqa: TRY004
    host, ports = pod.get("publicIp"), pod.get("portMappings")
    if not host or not ports:
        raise ValueError(f"the pod has no address yet (it is {pod.get('desiredStatus', 'of unknown status')})")
    if not isinstance(ports, dict) or SSH not in ports:
        raise ValueError("the pod does not expose port 22: add 22 to its TCP ports")
    return str(host), int(ports[SSH])


def ask(pod: str, api: str) -> Any:
    """The pod as RunPod's API tells it. The key goes into a header, never into an argument that `ps` would show."""
    key = os.environ.get("RUNPOD_API_KEY")
    if not key:
        raise ValueError("RUNPOD_API_KEY is not set where gpumesh was started")
    url = f"{api}/pods/{urllib.parse.quote(pod, safe='')}"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return json.load(answer)


def read(command: list[str]) -> Any:
    if not command:
        return json.load(sys.stdin)
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_S).stdout)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Print where a RunPod pod's sshd is: host and port.")
    parser.add_argument("--pod", metavar="ID", help="ask RunPod's API for this pod")
    parser.add_argument("--api", default=API, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="prints the pod's JSON; without it stdin is read")
    given = parser.parse_args(arguments)
    try:
        host, port = address(ask(given.pod, given.api) if given.pod else read(given.command))
    except (ValueError, TypeError, OSError, subprocess.SubprocessError) as error:
        print(f"runpod-address: {error}", file=sys.stderr)
        return 1
    print(host, port)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
