"""The findings of `config check` about a valid mesh.yaml: what will probably not work on this machine.

This module reads files, variables and ``~/.ssh/config``, never the network. Each function yields findings of one kind.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from gpumesh.config import credentials, environment, providers
from gpumesh.config.mesh_file.topology_builder import DEFAULT_NAME
from gpumesh.config.redis_url import TLS_SCHEMES, redis_hosts
from gpumesh.config.ssh import key_files, ssh_config
from gpumesh.errors import SecretMissing
from gpumesh.state import Finding, Severity
from gpumesh.text.addresses import is_loopback
from gpumesh.text.quoting import paste_command
from gpumesh.text.sentences import join_all
from gpumesh.topology import HostKeyPolicy, NodeSpec, RedisSpec, SshSpec, Topology, TransportKind


def check(topology: Topology) -> list[Finding]:
    """Returns the findings: about the gateway, about each node in the order of the file, then about servers that nodes
    share, and about pools."""
    findings = list(_check_gateway(topology))
    if not any(node.enabled for node in topology.nodes):
        message = "every node has `enabled: false`, so there is nothing to use"
        findings.append(Finding("no-node", Severity.WARNING, None, message))
    for node in topology.nodes:
        if node.enabled:
            findings += _check_node(node)
    findings += _find_shared_servers(topology)
    findings += _find_unusable_members(topology)
    return findings


def _check_gateway(topology: Topology) -> Iterator[Finding]:
    """Findings about the gateway, Redis and messages: secrets that are not set, and traffic without encryption."""
    gateway = topology.gateway
    if gateway.api_key_env is not None:
        yield from _check_variable(gateway.api_key_env, "gateway.api_key_env", None)
    for key in gateway.keys:
        if key.env is not None:
            yield from _check_variable(key.env, f"the key {key.name} of the gateway", None)
        if key.file is not None:
            yield from _check_key_of_client(key.name, key.file)
    if gateway.host is not None and not is_loopback(gateway.host):
        message = (
            f"the gateway listens on {gateway.host} without encryption: prompts and the key can be read on the way"
        )
        hint = "keep it to a network that you trust, or put a proxy with TLS before it"
        yield Finding("plain-http", Severity.WARNING, None, message, hint)
    if topology.redis is not None:
        yield from _check_redis(topology.redis, topology.name)
    for index, rule in enumerate(topology.notify):
        for name, variable in (("webhook_env", rule.webhook_env), ("token_env", rule.token_env)):
            if variable is not None:
                yield from _check_variable(variable, f"notify[{index}].{name}", None)


def _check_redis(redis: RedisSpec, mesh_name: str) -> Iterator[Finding]:
    """Findings about the Redis that gateways share: its variables, its certificates, and a mesh without a name."""
    for key in ("password_env", "sentinel_password_env"):
        variable = getattr(redis, key)
        if variable is not None:
            yield from _check_variable(variable, f"redis.{key}", None)
    has_tls = redis.url.startswith(tuple(f"{scheme}://" for scheme in TLS_SCHEMES))
    if redis.ca_file is not None and not os.access(redis.ca_file, os.R_OK):
        yield Finding("redis-ca", Severity.WARNING, None, f"the file {redis.ca_file} (redis.ca_file) cannot be read")
    elif redis.ca_file is not None and not has_tls:
        yield Finding("redis-ca", Severity.WARNING, None, "redis.ca_file has no effect: redis.url is without TLS")
    hosts = redis_hosts(redis.url)
    if not has_tls and not all(map(is_loopback, hosts)):
        message = (
            f"Redis on {join_all(hosts)} is asked without encryption: passwords and batches can be read on the way"
        )
        yield Finding("redis-plain", Severity.INFO, None, message, "use rediss://, or a network that you trust")
    if mesh_name == DEFAULT_NAME:
        message = (
            f"mesh.yaml has no `name`, so it shares places and batches with any mesh {DEFAULT_NAME!r} on this Redis"
        )
        yield Finding("redis-name", Severity.WARNING, None, message, "write `name: NAME`, the same for all gateways")


def _check_key_of_client(name: str, path: Path) -> Iterator[Finding]:
    """A finding if the file with the key of a client cannot be used, or if other users can read it."""
    try:
        credentials.read_secret_file(path)
    except SecretMissing as error:
        yield Finding("secret-missing", Severity.ERROR, None, f"the key {name} of the gateway: {error}", error.hint)
        return
    if stat.S_IMODE(path.stat().st_mode) & 0o044:
        message = f"the file {path} with the key {name} of the gateway can be read by other users of this machine"
        yield Finding("key-open", Severity.WARNING, None, message, paste_command("chmod 600 {FILE}", FILE=str(path)))


def _check_node(node: NodeSpec) -> Iterator[Finding]:
    """Findings about one node: its variables, its alias, its credentials and the way to its host."""
    if node.backend.api_key_env is not None:
        yield from _check_variable(node.backend.api_key_env, "backend.api_key_env", node.name)
    if node.ssh is None:
        return
    if node.ssh.alias is not None:
        yield from _check_alias(node.ssh.alias, node.ssh, node.name)
    yield from _check_credentials(node.ssh, node.name)
    yield from _check_host(node.ssh, node.name)


def _check_variable(variable: str, key: str, node: str | None) -> Iterator[Finding]:
    """A finding if the secret's variable, which ``key`` of mesh.yaml names, is not set. ``node``: the key's node."""
    if not credentials.is_secret_set(variable):
        message = f"{key} names the variable {variable}, which is not set here"
        yield Finding("secret-missing", Severity.ERROR, node, message, f"export {variable}=… before `gpumesh up`")


def _check_alias(alias: str, ssh: SshSpec, node: str) -> Iterator[Finding]:
    """Findings about a node's alias: unreadable, unknown, or with features that need the system's ssh. The last is only
    for information if the node uses the system's ssh already."""
    try:
        settings = ssh_config.resolve_alias(alias, home=environment.home())
    except ValueError as error:
        yield Finding("alias-unreadable", Severity.ERROR, node, str(error))
        return
    if not settings.configured:
        message = f"nothing is configured for {alias!r} in ~/.ssh/config: it is taken for the host's name"
        yield Finding("alias-unknown", Severity.WARNING, node, message, "check `ssh.alias` for a misspelling")
    if settings.openssh_features and ssh.transport is TransportKind.OPENSSH:
        message = f"{alias!r} uses {join_all(settings.openssh_features)}, so the system's ssh carries this node"
        yield Finding("alias-needs-openssh", Severity.INFO, node, message)
    elif settings.openssh_features:
        message = f"{alias!r} uses {join_all(settings.openssh_features)}, which transport sshtunnel does not know"
        yield Finding(
            "alias-needs-openssh", Severity.WARNING, node, message, "write `transport: openssh` under its ssh"
        )


def _check_credentials(ssh: SshSpec, node: str) -> Iterator[Finding]:
    """Findings about what a node's login needs: the variables with secrets, the key files, or an agent."""
    for variable, key in ((ssh.password_env, "ssh.password_env"), (ssh.passphrase_env, "ssh.passphrase_env")):
        if variable is not None:
            yield from _check_variable(variable, key, node)
    for path in ssh.identity_files:
        yield from _check_key_file(path, ssh, node)
    has_agent = ssh.agent and environment.ssh_auth_sock() is not None
    has_credentials = ssh.identity_files or has_agent or ssh.password_env
    # The system's ssh may have credentials that this file does not name: the keys of its own configuration.
    if not has_credentials and ssh.transport is not TransportKind.OPENSSH:
        message = "there is nothing to log in with: no key file, no SSH agent, no password"
        hint = "give `ssh.identity_file` or `ssh.password_env`, or start an agent and `ssh-add` a key"
        yield Finding("no-credentials", Severity.WARNING, node, message, hint)


def _check_key_file(path: Path, ssh: SshSpec, node: str) -> Iterator[Finding]:
    """Findings about one key file of a node: it is unreadable, other users can read it, it is a public key without an
    agent, or its secret is on a security token, which transport sshtunnel cannot use."""
    try:
        mode = path.stat().st_mode
        kind = key_files.detect_key_kind(path)
    except OSError as error:
        message = f"the key file {path} cannot be read: {error.strerror}"
        yield Finding("key-unreadable", Severity.ERROR, node, message, "check `ssh.identity_file`")
        return
    has_agent = ssh.agent and environment.ssh_auth_sock() is not None
    if kind is key_files.KeyKind.PUBLIC:  # its private key may be in the agent (1Password, a YubiKey, gpg-agent)
        if not has_agent and ssh.transport is TransportKind.SSHTUNNEL:
            message = f"{path} is a public key, and there is no SSH agent that could have its private key"
            hint = "name the private key beside it, or start the agent that has it"
            yield Finding("key-unreadable", Severity.ERROR, node, message, hint)
        return
    if stat.S_IMODE(mode) & 0o077:  # a permission for the group or for other users
        message = f"the key file {path} can be read by other users of this machine, and ssh refuses such keys"
        yield Finding("key-open", Severity.WARNING, node, message, paste_command("chmod 600 {FILE}", FILE=str(path)))
    if kind is key_files.KeyKind.FIDO and not has_agent and ssh.transport is TransportKind.SSHTUNNEL:
        message = f"{path} is a key on a security token, which transport sshtunnel can use through an SSH agent only"
        hint = "write `transport: openssh` under its ssh, or `ssh-add` the key"
        yield Finding("transport-unsupported", Severity.WARNING, node, message, hint)


def _check_host(ssh: SshSpec, node: str) -> Iterator[Finding]:
    """Findings about the way to the host: its address, the ssh program, its host key."""
    proxy = providers.describe_terminal_proxy(ssh.host)
    if proxy is not None:
        yield Finding("transport-unsupported", Severity.ERROR, node, proxy, providers.EXPOSED_TCP_HINT)
    if ssh.transport is TransportKind.OPENSSH and shutil.which("ssh") is None:
        message = "transport openssh needs the program ssh, which is not installed here"
        yield Finding("transport-unsupported", Severity.ERROR, node, message, "install OpenSSH's client")
    # Policy accept-new needs no known key. The system's ssh also reads the keys in /etc/ssh/ssh_known_hosts.
    needs_known_hosts = ssh.host_key_policy is HostKeyPolicy.STRICT and ssh.transport is TransportKind.SSHTUNNEL
    if needs_known_hosts and not any(file.is_file() for file in ssh.known_hosts_files):
        message = f"there is no {ssh.known_hosts} yet, so no host's key is known"
        hint = f"{paste_command('gpumesh trust {NODE}', NODE=node)} shows and records it"
        if ssh.proxy_jump:
            hint += ", and first those of the jump hosts"
        yield Finding("host-key-unknown", Severity.WARNING, node, message, hint)
    if ssh.address_from is not None:
        program, *_ = ssh.address_from.command
        if shutil.which(program) is None:
            message = f"the program of address_from, {program!r}, cannot be found or run"
            yield Finding("address-from", Severity.ERROR, node, message, "give its whole path, and make it executable")


def _find_shared_servers(topology: Topology) -> Iterator[Finding]:
    """Findings about nodes that name the same server: the balancer would send that server twice its share.

    A node whose address only `address_from` knows is left out.
    """
    nodes_by_server: dict[str, list[str]] = defaultdict(list)  # by the URL, and the host from which it is seen
    for node in topology.nodes:
        address_is_unknown = node.ssh is not None and node.ssh.address_from is not None
        if not node.enabled or address_is_unknown:
            continue
        host = "" if node.ssh is None else f" at {node.ssh.user}@{node.ssh.host}:{node.ssh.port}"
        for target in node.backend.targets:
            url = target.url.replace("//localhost:", "//127.0.0.1:")  # two names of one address
            names = nodes_by_server[url + host]
            if node.name not in names:  # one node may name one server twice
                names.append(node.name)
    for server, names in nodes_by_server.items():
        if len(names) > 1:
            both_or_all = "both" if len(names) == 2 else "all"
            message = f"{join_all(names)} {both_or_all} name {server}"
            hint = "`gpumesh audit` tells whether they are one server"
            yield Finding("tunnel-duplicate", Severity.INFO, None, message, hint, tuple(names))


def _find_unusable_members(topology: Topology) -> Iterator[Finding]:
    """Findings about nodes of pools that can hold no layers: disabled ones, and ones without a GPU and without
    ``memory``."""
    for pool in topology.pools:
        for member in pool.members:
            node = topology.node(member.node)
            if not node.enabled:
                message = f"the pool {pool.name} uses {node.name}, which has `enabled: false`"
                yield Finding("pool-node-unusable", Severity.WARNING, node.name, message, "enable it, or leave it out")
            elif node.expect.gpus == 0 and member.memory_mib is None:
                message = f"the pool {pool.name} uses {node.name}, which is expected to have no GPU"
                hint = f"`{{node: {node.name}, memory: 8GiB}}` lets it take part with its CPU"
                yield Finding("pool-node-unusable", Severity.WARNING, node.name, message, hint)
