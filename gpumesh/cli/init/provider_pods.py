"""Reads the SSH addresses of pods from the JSON of providers' tools. Pure.

Two formats are known: the pods of RunPod's REST API (``/v1/pods``), and the output of ``vastai show instances --raw``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpumesh.errors import UsageError

SSH_PORT_KEY = "22"  # in the tables that map the pod's ports to public ports
_HINT = "for example: vastai show instances --raw | gpumesh init --from -"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod and the public address of its SSH server. ``unreachable_reason`` says why the pod cannot be reached now;
    then ``host`` is ``None``."""

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
    """Yields the pods of a JSON value and of the lists inside it; none for an empty list. Raises UsageError for a value
    that is no list and no object, and for an object that is no pod."""
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
    """A pod of RunPod or an instance of vast.ai: the keys tell which. Raises UsageError for an object with other
    keys."""
    if "portMappings" in entry or "publicIp" in entry:
        return _read_runpod(entry)
    if any(key in entry for key in ("ssh_host", "public_ipaddr", "actual_status")):
        return _read_vast(entry)
    first_keys = ", ".join(list(map(str, entry))[:6])  # enough to recognise the document
    raise UsageError(f"this is neither a pod of RunPod nor an instance of vast.ai: {first_keys}", hint=_HINT)


def _read_runpod(pod: Mapping[str, Any]) -> Pod:
    """A pod of RunPod, with its public IP address and the public port of port 22."""
    name = str(pod.get("name") or pod.get("id") or "pod")
    host, public_ports = pod.get("publicIp"), pod.get("portMappings")
    if not host or not public_ports:
        reason = f"it has no address yet (it is {pod.get('desiredStatus') or 'starting'})"
        return Pod(name, "RunPod", unreachable_reason=reason)
    port = _read_port(public_ports.get(SSH_PORT_KEY)) if isinstance(public_ports, dict) else None
    if port is None:
        return Pod(name, "RunPod", unreachable_reason="it does not expose port 22: add 22 to its TCP ports")
    return Pod(name, "RunPod", str(host), port)


def _read_vast(instance: Mapping[str, Any]) -> Pod:
    """An instance of vast.ai, with its direct address if there is one, else the address of vast.ai's proxy."""
    name = str(instance.get("label") or f"vast-{instance.get('id', 'instance')}")
    host = str(instance.get("public_ipaddr") or "").strip()
    direct_port = _read_direct_port(instance.get("ports"))
    if host and direct_port is not None:
        return Pod(name, "vast.ai", host, direct_port)
    proxy, proxy_port = instance.get("ssh_host"), _read_port(instance.get("ssh_port"))
    if not proxy or proxy_port is None:
        reason = f"it has no address yet (it is {instance.get('actual_status') or 'starting'})"
        return Pod(name, "vast.ai", unreachable_reason=reason)
    if "jupyter" in str(instance.get("image_runtype") or ""):
        proxy_port += 1  # Jupyter has the proxy's port, and sshd the next port
    return Pod(name, "vast.ai", str(proxy), proxy_port)


def _read_direct_port(ports: Any) -> int | None:
    """The public port of port 22, from Docker's table ``{"22/tcp": [{"HostPort": "40123"}]}``; ``None`` if there is
    none. ``ports`` may also be a list, or null."""
    mappings = ports.get(f"{SSH_PORT_KEY}/tcp") if isinstance(ports, dict) else None
    if not isinstance(mappings, list) or not mappings:
        return None
    first_mapping = mappings[0]
    return _read_port(first_mapping.get("HostPort")) if isinstance(first_mapping, dict) else None


def _read_port(value: Any) -> int | None:
    """The port, which some tools write as text; ``None`` if it is no port. The highest port is 65534, because
    ``_read_vast`` may use the port after it."""
    try:
        port = int(value)
    except (TypeError, ValueError, OverflowError):  # neither a number nor text; text that is no number; infinity
        return None
    return port if 1 <= port <= 65534 else None
