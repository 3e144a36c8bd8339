"""From the checked form to the frozen specs: defaults merged, paths made absolute, aliases looked up."""

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
USUAL_PORT = 11434  # of a server whose kind nobody has said yet: Ollama's, which is by far the most common
# For their defaults, which topology.py alone gives.
_USUAL_SSH = SshSpec("")
_USUAL_ADDRESS = AddressCommand(())


@dataclass(slots=True)
class TopologyBuilder:
    """``base`` is where relative paths start. ``identities``: keys that ssh would try by itself."""

    user: str
    home: Path
    base: Path
    resolve_alias: ResolveAlias | None = None
    identities: tuple[Path, ...] = ()
    faults: list[Fault] = field(default_factory=list)

    def build_topology(self, file: MeshFile, source: Path | None) -> Topology:
        """With ``faults`` added to, it is not to be used."""
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
            # Where the server is, is one thing said in three ways: a node's way replaces the default's.
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
        """The node's own words hold before its alias's, those before the defaults."""
        own = node.ssh or Ssh()
        alias = own.alias or defaults.alias
        answer = self._alias(alias, (*path, "alias")) if alias is not None else None
        said = _merged(defaults, own)
        if answer is not None:
            said = _merged(_merged(defaults, self._configured(answer, (*path, "alias"))), own)
        files = said.identity_file or ()
        identities = tuple(self._path(file) for file in files)
        if said.identity_file is None and said.password_env is None:
            identities = self.identities
        address = node.address_from
        return SshSpec(
            host=said.host or "",
            port=_first(said.port, None, 22),
            user=said.user or self.user,
            identity_files=identities,
            known_hosts=self._path(said.known_hosts or "~/.ssh/known_hosts"),
            host_key_policy=_first(said.host_key_policy, None, HostKeyPolicy.STRICT),
            proxy_jump=said.proxy_jump or (),
            password_env=said.password_env,
            passphrase_env=said.passphrase_env,
            agent=_first(said.agent, None, True),
            alias=alias,
            transport=self._transport(said, answer, (*path, "transport")),
            connect_timeout_s=_first(said.connect_timeout, None, _USUAL_SSH.connect_timeout_s),
            keepalive_s=_first(said.keepalive, None, _USUAL_SSH.keepalive_s),
            address_from=None if address is None else self._address(address),
        )

    def _alias(self, alias: str, path: KeyPath) -> AliasSettings | None:
        if self.resolve_alias is None:
            return AliasSettings(host=alias)
        try:
            return self.resolve_alias(alias)
        except ValueError as error:
            self.faults.append(Fault(str(error), None, path))
            return None

    def _configured(self, answer: AliasSettings, path: KeyPath) -> Ssh:
        """An alias's answer in mesh.yaml's words, held to the same forms."""
        said = {
            "host": answer.host,
            "port": None if answer.port is None else str(answer.port),
            "user": answer.user,
            "identity_file": answer.identity_files or None,
            "known_hosts": answer.known_hosts,
            "proxy_jump": answer.proxy_jump or None,
        }
        try:
            return Ssh.model_validate(said)
        except ValidationError as error:
            for each in error.errors(include_url=False):
                reason = each.get("ctx", {}).get("error", each["msg"])
                self.faults.append(Fault(f"in ~/.ssh/config its {each['loc'][0]} {reason}", None, path))
            return Ssh()

    def _transport(self, said: Ssh, answer: AliasSettings | None, path: KeyPath) -> TransportKind:
        """Without a word of the user's, the one that does what the alias asks. A ProxyCommand is a way around a wall:
        passing it by in silence would reach another machine or none."""
        needs = answer.openssh_features if answer is not None else ()
        if said.transport is None:
            return TransportKind.OPENSSH if needs else TransportKind.SSHTUNNEL
        if said.transport is TransportKind.SSHTUNNEL and "ProxyCommand" in needs:
            message = f"sshtunnel cannot run the ProxyCommand of {said.alias!r} in ~/.ssh/config: write openssh"
            self.faults.append(Fault(message, None, path))
        return said.transport

    def _address(self, address: AddressFrom) -> AddressCommand:
        program, *words = address.command
        if program.startswith("~") or "/" in program:
            program = str(self._path(program))
        return AddressCommand((program, *words), _first(address.timeout, None, _USUAL_ADDRESS.timeout_s))

    def _gateway(self, gateway: Gateway) -> GatewaySpec:
        usual = GatewaySpec()
        host, port, socket = usual.host, usual.port, None
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
            max_queue=_first(gateway.max_queue, None, usual.max_queue),
            body_memory_mib=_first(gateway.body_memory_mib, None, usual.body_memory_mib),
            timeout_s=_first(gateway.timeout, None, usual.timeout_s),
            cors_origins=gateway.cors_origins or (),
            access_log=_first(gateway.access_log, None, usual.access_log),
        )

    def _socket(self, text: str) -> Path:
        path = self._path(text)
        try:
            listen_address.check_socket_path(str(path))  # which may have become longer
        except ValueError as error:
            self.faults.append(Fault(f"{path} {error}", None, ("gateway", "listen")))
        return path

    def _path(self, text: str) -> Path:
        if text == "~" or text.startswith("~/"):
            return self.home / text[2:]
        return self.base / text


def _tunnels(tunnels: Tunnels) -> TunnelsSpec:
    usual = DEFAULT_TUNNELS
    return TunnelsSpec(_first(tunnels.share, None, usual.share), _first(tunnels.listen, None, usual.listen))


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
        targets = (Target("127.0.0.1", USUAL_PORT if port is None else port),)
    return BackendSpec(kind, targets, backend.api_key_env, backend.max_parallel)


def _expect(expect: Expect) -> ExpectSpec:
    return ExpectSpec(expect.hostname, expect.gpus, expect.gpu, expect.vram_mib, expect.driver, expect.models or ())


def _merged(under: S, over: S) -> S:
    """``over``'s values, and ``under``'s where it is silent."""
    said = {name: value for name in type(over).model_fields if (value := getattr(over, name)) is not None}
    return under.model_copy(update=said)


T = TypeVar("T")


def _first(own: T | None, shared: T | None, usual: T) -> T:
    if own is not None:
        return own
    return shared if shared is not None else usual
