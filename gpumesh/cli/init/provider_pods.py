"""Reads the SSH addresses of pods from the JSON of providers' tools. Pure.

It understands the pods of RunPod's REST API (``/v1/pods``) and the output of ``vastai show instances --raw``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpumesh.errors import UsageError

SSH_PORT_KEY = "22"
_HINT = "for example: vastai show instances --raw | gpumesh init --from -"


@dataclass(frozen=True, slots=True)
class Pod:
    """``unreachable_reason`` says why the pod cannot be reached now; then ``host`` is ``None``."""

    name: str
    provider: str
    host: str | None = None
    port: int = 22
    unreachable_reason: str | None = None


def read_pods(text: str) -> list[Pod]:
    """All pods of a JSON document: a pod, a list of pods, or a list under ``pods``, ``instances`` or ``data``. Raises
    UsageError for any other document."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"standard input is not JSON: {error}", hint=_HINT) from error
    pods = list(_find_pods(document))
    if not pods:
        raise UsageError("there is no pod in the JSON on standard input", hint=_HINT)
    return pods


def _find_pods(document: Any) -> Iterator[Pod]:
    if isinstance(document, dict):
        for key in ("pods", "instances", "data"):
            if isinstance(document.get(key), (list, dict)):
                yield from _find_pods(document[key])
                return
        yield _read_pod(document)
    elif isinstance(document, list):
        for entry in document:
            yield from _find_pods(entry)
    else:
        raise UsageError("this is not JSON that tells of pods: an object or a list of them is expected", hint=_HINT)


def _read_pod(entry: Mapping[str, Any]) -> Pod:
    if "portMappings" in entry or "publicIp" in entry:
        return _read_runpod(entry)
    if not entry.keys().isdisjoint(("ssh_host", "public_ipaddr", "actual_status")):
        return _read_vast(entry)
    raise UsageError(
        f"this is neither a pod of RunPod nor an instance of vast.ai: {', '.join(list(map(str, entry))[:6])}",
        hint=_HINT,
    )


def _read_runpod(pod: Mapping[str, Any]) -> Pod:
    name = str(pod.get("name") or pod.get("id") or "pod")
    host, ports = pod.get("publicIp"), pod.get("portMappings")
    if not host or not ports:
        return Pod(
            name, "RunPod", unreachable_reason=f"it has no address yet (it is {pod.get('desiredStatus') or 'starting'})"
        )
    port = _read_port(ports.get(SSH_PORT_KEY)) if isinstance(ports, dict) else None
    if port is None:
        return Pod(name, "RunPod", unreachable_reason="it does not expose port 22: add 22 to its TCP ports")
    return Pod(name, "RunPod", str(host), port)


def _read_vast(instance: Mapping[str, Any]) -> Pod:
    """The direct address if there is one, else the proxy's. ``ports`` may be a dict, a list, or null."""
    name = str(instance.get("label") or f"vast-{instance.get('id', 'instance')}")
    host, ports = str(instance.get("public_ipaddr") or "").strip(), instance.get("ports")
    mapped = ports.get(f"{SSH_PORT_KEY}/tcp") if isinstance(ports, dict) else None
    if host and isinstance(mapped, list) and mapped and isinstance(mapped[0], dict):
        port = _read_port(mapped[0].get("HostPort"))
        if port is not None:
            return Pod(name, "vast.ai", host, port)
    proxy, port = instance.get("ssh_host"), _read_port(instance.get("ssh_port"))
    if not proxy or port is None:
        return Pod(
            name,
            "vast.ai",
            unreachable_reason=f"it has no address yet (it is {instance.get('actual_status') or 'starting'})",
        )
    if "jupyter" in str(instance.get("image_runtype") or ""):
        port += 1  # Jupyter has the proxy's port, and sshd the next port
    return Pod(name, "vast.ai", str(proxy), port)


def _read_port(value: Any) -> int | None:
    """The port, which some tools write as text; ``None`` if it is no port. At most 65534: it may be the next port that
    is used (``_read_vast``)."""
    try:
        port = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return port if 1 <= port <= 65534 else None
