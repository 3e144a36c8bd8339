"""Writes a topology as a mesh.yaml with every default (`config show`), with secrets masked.

Reading that text gives the same topology, so the text can be kept as a file. Only the path of a webhook is masked.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

import yaml

from gpumesh.config import listen_address, value_parsers
from gpumesh.config.credentials import mask_secrets
from gpumesh.pool_spec import PoolMember, PoolSpec
from gpumesh.text.addresses import format_address
from gpumesh.topology import (
    BackendSpec,
    EventKind,
    ExpectSpec,
    GatewaySpec,
    KeySpec,
    ModelSpec,
    NodeSpec,
    NotifySpec,
    SshSpec,
    Topology,
)


def dump_effective(topology: Topology) -> str:
    """Returns the topology as the text of a mesh.yaml. Specs should hold no secrets; a secret in a spec is masked."""
    document: dict[str, Any] = {"version": 1, "name": topology.name, "gateway": _gateway_entries(topology.gateway)}
    document["tunnels"] = {"share": topology.tunnels.share, "listen": topology.tunnels.listen.value}
    document["nodes"] = [_node_entries(node) for node in topology.nodes]
    if topology.models:
        document["models"] = {model.name: _model_entries(model) for model in topology.models}
    if topology.notify:
        document["notify"] = [_notify_entries(rule) for rule in topology.notify]
    if topology.pools:
        document["pools"] = [_pool_entries(pool) for pool in topology.pools]
    if topology.redis is not None:
        # The password in redis://USER:PASSWORD@HOST. mesh.yaml does not allow one, but a caller can build such a spec.
        url = re.sub(r"(?<=://)([^/@:]*):[^/@]*@", r"\1:********@", topology.redis.url)
        document["redis"] = _drop_empty({**asdict(topology.redis), "url": url})
    safe_document = _mask_and_escape(document)
    text = yaml.dump(safe_document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return str(text)


def dump_node(node: NodeSpec) -> str:
    """Returns one node as the text of its entry in mesh.yaml, with every default, as ``dump_effective`` has it."""
    text = yaml.dump(node_settings(node), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return str(text)


def node_settings(node: NodeSpec) -> dict[str, Any]:
    """Returns one node as its entry in mesh.yaml, with every default, and with secrets masked."""
    entries: dict[str, Any] = _mask_and_escape(_node_entries(node))
    return entries


class _Dumper(yaml.SafeDumper):
    """Writes no anchors: a list that two nodes share is written twice."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the base class's signature
        return True


def _gateway_entries(spec: GatewaySpec) -> dict[str, Any]:
    """Returns the section ``gateway`` of mesh.yaml, without keys that have no value. The functions below return the
    other sections in the same way."""
    listen: list[str] = []
    if spec.host is not None:
        listen.append(format_address(spec.host, spec.port))
    if spec.socket is not None:
        listen.append(f"{listen_address.UNIX_PREFIX}{spec.socket}")
    return _drop_empty(
        {
            "listen": listen[0] if len(listen) == 1 else listen,
            "api_key_env": spec.api_key_env,
            "default_model": spec.default_model,
            "policy": spec.policy.value,
            "max_queue": spec.max_queue,
            "body_memory_mib": spec.body_memory_mib,
            "timeout": value_parsers.format_duration(spec.timeout_s),
            "cors_origins": list(spec.cors_origins),
            "access_log": spec.access_log,
            "keys": [_key_entries(key) for key in spec.keys],
            "route_priority": {path: priority.value for path, priority in spec.route_priority.items()},
            "heartbeat": {path: value_parsers.format_heartbeat(value) for path, value in spec.heartbeat_s.items()},
            "reload": spec.reload.value,
        }
    )


def _key_entries(spec: KeySpec) -> dict[str, Any]:
    """The entry of an API key under gateway.keys."""
    return _drop_empty(
        {
            "name": spec.name,
            "env": spec.env,
            "hash": spec.sha256,
            "priority": None if spec.priority is None else spec.priority.value,
            "nodes": list(spec.nodes or ()),
            "models": list(spec.models or ()),
            "file": None if spec.file is None else str(spec.file),
            "rate": None if spec.rate is None else value_parsers.format_rate(spec.rate),
            "tokens_per_month": spec.tokens_per_month,
        }
    )


def _node_entries(node: NodeSpec) -> dict[str, Any]:
    """The entry of a node. ``enabled`` is always written."""
    entries: dict[str, Any] = {"name": node.name}
    if node.ssh is not None:
        entries["ssh"] = _ssh_entries(node.ssh)
        if node.ssh.address_from is not None:
            address = node.ssh.address_from
            entries["address_from"] = {
                "command": list(address.command),
                "timeout": value_parsers.format_duration(address.timeout_s),
            }
    entries["backend"] = _backend_entries(node.backend)
    entries["expect"] = _expect_entries(node.expect)
    entries["weight"] = node.weight
    entries["tier"] = node.tier
    entries["eur_per_hour"] = node.eur_per_hour
    entries["labels"] = dict(node.labels)
    return {**_drop_empty(entries), "enabled": node.enabled}


def _ssh_entries(spec: SshSpec) -> dict[str, Any]:
    """The section ``ssh`` of a node."""
    entries = _drop_empty(
        {
            "host": spec.host or None,  # empty if only ``address_from`` knows the host
            "alias": spec.alias,
            "port": spec.port,
            "user": spec.user,
            "known_hosts": str(spec.known_hosts),
            "host_key_policy": spec.host_key_policy.value,
            "proxy_jump": list(spec.proxy_jump),
            "password_env": spec.password_env,
            "passphrase_env": spec.passphrase_env,
            "agent": spec.agent,
            "identities_only": spec.identities_only,
            "transport": spec.transport.value,
            "connect_timeout": value_parsers.format_duration(spec.connect_timeout_s),
            "keepalive": value_parsers.format_duration(spec.keepalive_s),
        }
    )
    # Written even when it is empty: without this key the default key files would be used.
    return {**entries, "identity_file": [str(path) for path in spec.identity_files]}


def _backend_entries(spec: BackendSpec) -> dict[str, Any]:
    """The section ``backend`` of a node."""
    return _drop_empty(
        {
            "kind": spec.kind.value,
            "urls": [target.url for target in spec.targets],
            "api_key_env": spec.api_key_env,
            "max_parallel": spec.max_parallel,
        }
    )


def _expect_entries(spec: ExpectSpec) -> dict[str, Any]:
    """The section ``expect`` of a node."""
    return _drop_empty(
        {
            "hostname": spec.hostname,
            "gpus": spec.gpus,
            "gpu": spec.gpu,
            "vram_mib": spec.vram_mib,
            "driver": spec.driver,
            "models": list(spec.models),
        }
    )


def _model_entries(spec: ModelSpec) -> dict[str, Any]:
    """The entry of a model under ``models``."""
    return _drop_empty(
        {
            "nodes": list(spec.nodes or ()),
            "prefer": list(spec.prefer),
            "copies": spec.wanted_copies,
            "pinned": spec.pinned,
            "context_steps": list(spec.context_steps),
            "aliases": list(spec.aliases),
            "fallback": spec.fallback,
        }
    )


def _pool_entries(spec: PoolSpec) -> dict[str, Any]:
    """The entry of a pool under ``pools``."""
    return _drop_empty(
        {
            "name": spec.name,
            "model": spec.model,
            "nodes": [_pool_member_entry(member) for member in spec.members],
            "head": spec.head,
            "context": spec.context,
            "parallel": spec.parallel,
            "kv_type": spec.kv_type.value,
            "split": list(spec.split or ()),
            "draft": spec.draft,
            "llama_cpp_dir": spec.llama_cpp_dir,
            "unload": spec.unload,
            "autostart": spec.autostart,
        }
    )


def _pool_member_entry(member: PoolMember) -> str | dict[str, Any]:
    if member.memory_mib is None:
        return member.node
    return {"node": member.node, "memory": value_parsers.format_size(member.memory_mib)}


def _notify_entries(spec: NotifySpec) -> dict[str, Any]:
    """The entry of a rule under ``notify``. The path of a webhook is masked: it may be a secret."""
    return _drop_empty(
        {
            "webhook": None if spec.webhook is None else _mask_path(spec.webhook),
            "webhook_env": spec.webhook_env,
            "command": list(spec.command),
            "desktop": spec.desktop or None,
            "token_env": spec.token_env,
            "format": spec.format.value if spec.webhook or spec.webhook_env else None,
            "on": [kind.value for kind in EventKind if kind in spec.on],
            "quiet": value_parsers.format_duration(spec.quiet_s),
        }
    )


def _mask_path(url: str) -> str:
    """Returns the URL of a webhook with its path masked: whoever knows the path can post there."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/********" if parts.path.strip("/") or parts.query else url


def _drop_empty(entries: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries without those whose value is ``None`` or an empty collection; ``false`` and 0 stay."""
    empty_values: tuple[Any, ...] = (None, [], {})
    return {key: value for key, value in entries.items() if value not in empty_values}


def _mask_and_escape(value: Any) -> Any:
    """Returns the value with secrets masked and ``${`` escaped in all its strings, also inside lists and mappings."""
    if isinstance(value, str):
        return mask_secrets(value).replace("${", "$${")  # the reader of mesh.yaml would expand "${" as a variable
    if isinstance(value, list):
        return [_mask_and_escape(member) for member in value]
    if isinstance(value, dict):
        return {key: _mask_and_escape(member) for key, member in value.items()}
    return value
