"""Builds the specs from the validated file: merges defaults, makes paths absolute, resolves ssh aliases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from pydantic import ValidationError

from gpumesh.backends.dialects import find_dialect
from gpumesh.config import listen_address
from gpumesh.config.mesh_file.file_schema import (
    AddressFrom,
    Backend,
    Expect,
    Gateway,
    MeshFile,
    Node,
    NodeDefaults,
    Section,
    Ssh,
    Tunnels,
)
from gpumesh.config.mesh_file.yaml_tree import Fault, KeyPath
from gpumesh.config.ssh.ssh_config import AliasSettings
from gpumesh.topology import (
    DEFAULT_TUNNELS,
    AddressCommand,
    BackendKind,
    BackendSpec,
    ExpectSpec,
    GatewaySpec,
    HostKeyPolicy,
    NodeSpec,
    PolicyKind,
    RedisSpec,
    SshSpec,
    Target,
    Topology,
    TransportKind,
    TunnelsSpec,
)

S = TypeVar("S", bound=Section)

ResolveAlias = Callable[[str], AliasSettings]
DEFAULT_NAME = "mesh"
DEFAULT_PORT = 11434  # of a server whose kind is not given: the port of Ollama, the most common kind
# For their default values, which only topology.py defines.
_DEFAULT_SSH = SshSpec("")
_DEFAULT_ADDRESS = AddressCommand(())


@dataclass(slots=True)
class TopologyBuilder:
    """``base`` is the folder of relative paths. ``identities``: the key files that ssh tries by default."""

    user: str
    home: Path
    base: Path
    resolve_alias: ResolveAlias | None = None
    identities: tuple[Path, ...] = ()
    faults: list[Fault] = field(default_factory=list)

    def build_topology(self, file: MeshFile, source: Path | None) -> Topology:
        """The topology. It must not be used if ``faults`` is not empty afterwards."""
        defaults = file.defaults or NodeDefaults()
        nodes = tuple(self._node(node, defaults, ("nodes", index)) for index, node in enumerate(file.nodes))
        redis = RedisSpec(file.redis.url, file.redis.password_env) if file.redis is not None else None
        gateway = self._gateway(file.gateway or Gateway())
        tunnels = _tunnels(file.tunnels or Tunnels())
        return Topology(file.name or DEFAULT_NAME, nodes, gateway, redis, source, tunnels)

    def _node(self, node: Node, defaults: NodeDefaults, path: KeyPath) -> NodeSpec:
        direct = node.ssh is None and node.address_from is None
        shared = defaults.backend or Backend()
        own = node.backend or Backend()
        if own.port is not None or own.url is not None or own.urls is not None:
            # port, url and urls are three forms of one setting: any of them replaces the default's.
            shared = shared.model_copy(update={"port": None, "url": None, "urls": None})
        return NodeSpec(
            name=node.name,
            backend=_backend(_merged(shared, own)),
            ssh=None if direct else self._ssh(node, defaults.ssh or Ssh(), (*path, "ssh")),
            expect=_expect(_merged(defaults.expect or Expect(), node.expect or Expect())),
            weight=_first(node.weight, defaults.weight, 1.0),
            labels=MappingProxyType({**(defaults.labels or {}), **(node.labels or {})}),
            enabled=_first(node.enabled, defaults.enabled, True),
        )

    def _ssh(self, node: Node, defaults: Ssh, path: KeyPath) -> SshSpec:
        """Settings of the node come before those of its alias, those before the defaults."""
        own = node.ssh or Ssh()
        alias = own.alias or defaults.alias
        answer = self._resolve_alias(alias, (*path, "alias")) if alias is not None else None
        settings = _merged(defaults, own)
        if answer is not None:
            settings = _merged(_merged(defaults, self._alias_settings(answer, (*path, "alias"))), own)
        files = settings.identity_file or ()
        identities = tuple(self._path(file) for file in files)
        if settings.identity_file is None and settings.password_env is None:
            identities = self.identities
        address = node.address_from
        return SshSpec(
            host=settings.host or "",
            port=_first(settings.port, None, 22),
            user=settings.user or self.user,
            identity_files=identities,
            known_hosts=self._path(settings.known_hosts or "~/.ssh/known_hosts"),
            host_key_policy=_first(settings.host_key_policy, None, HostKeyPolicy.STRICT),
            proxy_jump=settings.proxy_jump or (),
            password_env=settings.password_env,
            passphrase_env=settings.passphrase_env,
            agent=_first(settings.agent, None, True),
            alias=alias,
            transport=self._transport(settings, answer, (*path, "transport")),
            connect_timeout_s=_first(settings.connect_timeout, None, _DEFAULT_SSH.connect_timeout_s),
            keepalive_s=_first(settings.keepalive, None, _DEFAULT_SSH.keepalive_s),
            address_from=None if address is None else self._address(address),
        )

    def _resolve_alias(self, alias: str, path: KeyPath) -> AliasSettings | None:
        if self.resolve_alias is None:
            return AliasSettings(host=alias)
        try:
            return self.resolve_alias(alias)
        except ValueError as error:
            self.faults.append(Fault(str(error), None, path))
            return None

    def _alias_settings(self, answer: AliasSettings, path: KeyPath) -> Ssh:
        """The settings of an alias with mesh.yaml's keys, validated by the same schema."""
        values = {
            "host": answer.host,
            "port": None if answer.port is None else str(answer.port),
            "user": answer.user,
            "identity_file": answer.identity_files or None,
            "known_hosts": answer.known_hosts,
            "proxy_jump": answer.proxy_jump or None,
        }
        try:
            return Ssh.model_validate(values)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                reason = detail.get("ctx", {}).get("error", detail["msg"])
                self.faults.append(Fault(f"in ~/.ssh/config its {detail['loc'][0]} {reason}", None, path))
            return Ssh()

    def _transport(self, settings: Ssh, answer: AliasSettings | None, path: KeyPath) -> TransportKind:
        """The user's transport, or else the one that supports the alias. A ProxyCommand cannot be ignored: without it a
        connection would reach another machine or none."""
        needs = answer.openssh_features if answer is not None else ()
        if settings.transport is None:
            return TransportKind.OPENSSH if needs else TransportKind.SSHTUNNEL
        if settings.transport is TransportKind.SSHTUNNEL and "ProxyCommand" in needs:
            message = f"sshtunnel cannot run the ProxyCommand of {settings.alias!r} in ~/.ssh/config: write openssh"
            self.faults.append(Fault(message, None, path))
        return settings.transport

    def _address(self, address: AddressFrom) -> AddressCommand:
        program, *arguments = address.command
        if program.startswith("~") or "/" in program:
            program = str(self._path(program))
        return AddressCommand((program, *arguments), _first(address.timeout, None, _DEFAULT_ADDRESS.timeout_s))

    def _gateway(self, gateway: Gateway) -> GatewaySpec:
        default = GatewaySpec()
        host, port, socket = default.host, default.port, None
        if gateway.listen is not None:
            host = None
            for place in gateway.listen:
                if isinstance(place, str):
                    socket = self._socket(place)
                else:
                    host, port = place
        return GatewaySpec(
            host=host,
            port=port,
            socket=socket,
            api_key_env=gateway.api_key_env,
            default_model=gateway.default_model,
            policy=_first(gateway.policy, None, PolicyKind.ADAPTIVE),
            max_queue=_first(gateway.max_queue, None, default.max_queue),
            body_memory_mib=_first(gateway.body_memory_mib, None, default.body_memory_mib),
            timeout_s=_first(gateway.timeout, None, default.timeout_s),
            cors_origins=gateway.cors_origins or (),
            access_log=_first(gateway.access_log, None, default.access_log),
        )

    def _socket(self, text: str) -> Path:
        path = self._path(text)
        try:
            listen_address.check_socket_path(str(path))  # the absolute path may be too long
        except ValueError as error:
            self.faults.append(Fault(f"{path} {error}", None, ("gateway", "listen")))
        return path

    def _path(self, text: str) -> Path:
        if text == "~" or text.startswith("~/"):
            return self.home / text[2:]
        return self.base / text


def _tunnels(tunnels: Tunnels) -> TunnelsSpec:
    default = DEFAULT_TUNNELS
    return TunnelsSpec(_first(tunnels.share, None, default.share), _first(tunnels.listen, None, default.listen))


def _backend(backend: Backend) -> BackendSpec:
    kind = _first(backend.kind, None, BackendKind.AUTO)
    if backend.urls is not None:
        targets = tuple(dict.fromkeys(backend.urls))
    elif backend.url is not None:
        targets = (backend.url,)
    elif backend.port is not None:
        targets = (Target("127.0.0.1", backend.port),)
    else:
        dialect = find_dialect(kind)
        port = None if dialect is None else dialect.usual_port
        targets = (Target("127.0.0.1", DEFAULT_PORT if port is None else port),)
    return BackendSpec(kind, targets, backend.api_key_env, backend.max_parallel)


def _expect(expect: Expect) -> ExpectSpec:
    return ExpectSpec(expect.hostname, expect.gpus, expect.gpu, expect.vram_mib, expect.driver, expect.models or ())


def _merged(under: S, over: S) -> S:
    """The values of ``over``; those of ``under`` where ``over`` has none."""
    given = {name: value for name in type(over).model_fields if (value := getattr(over, name)) is not None}
    return under.model_copy(update=given)


T = TypeVar("T")


def _first(own: T | None, shared: T | None, default: T) -> T:
    if own is not None:
        return own
    return shared if shared is not None else default
