"""Builds the ``Topology`` from a validated mesh.yaml: merges defaults, makes paths absolute, resolves ssh aliases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from gpumesh.config import listen_address
from gpumesh.config.mesh_file.file_schema import (
    AddressFrom,
    ApiKey,
    Backend,
    Expect,
    Gateway,
    MeshFile,
    Model,
    Node,
    NodeDefaults,
    Notify,
    Redis,
    Ssh,
    Tunnels,
)
from gpumesh.config.mesh_file.pool_rules import find_nodes_without_host
from gpumesh.config.mesh_file.section_builders import (
    build_backend,
    build_expect,
    build_model,
    build_pool,
    build_tunnels,
    drop_replaced_location,
    merge,
    value_or,
)
from gpumesh.config.mesh_file.value_types import SectionOf, ValueProblem
from gpumesh.config.mesh_file.yaml_tree import Fault, KeyPath
from gpumesh.config.ssh.ssh_config import AliasSettings, expand_identity_files, resolve_jumps
from gpumesh.topology import (
    AddressCommand,
    GatewaySpec,
    HostKeyPolicy,
    JumpAlias,
    KeySpec,
    NodeSpec,
    NotifySpec,
    PolicyKind,
    RedisSpec,
    SshSpec,
    Topology,
    TransportKind,
)

ResolveAlias = Callable[[str], AliasSettings]
DEFAULT_NAME = "mesh"
# These two are used for their default values, which only topology.py defines.
_DEFAULT_SSH = SshSpec("")
_DEFAULT_ADDRESS = AddressCommand(())


@dataclass(slots=True)
class TopologyBuilder:
    """Builds the specs of one mesh.yaml. Collects problems in ``faults``, and goes on.

    ``user`` and ``home`` are our user's name and home folder. ``base`` is the folder from which relative paths start.
    ``identities`` are the key files that ssh tries by default.
    """

    user: str
    home: Path
    base: Path
    resolve_alias: ResolveAlias | None = None
    identities: tuple[Path, ...] = ()
    faults: list[Fault] = field(default_factory=list)

    def build_topology(self, file: MeshFile, source: Path | None) -> Topology:
        """Returns the topology of ``file``, whose path is ``source``. If this adds to ``faults``, the topology must not
        be used."""
        defaults = file.defaults or NodeDefaults()
        nodes = tuple(self._build_node(node, defaults, ("nodes", index)) for index, node in enumerate(file.nodes))
        redis = None if file.redis is None else self._build_redis(file.redis)
        gateway = self._build_gateway(file.gateway or Gateway())
        tunnels = build_tunnels(file.tunnels or Tunnels())
        pools = tuple(build_pool(pool) for pool in file.pools or ())
        node_names = tuple(node.name for node in nodes)
        models = tuple(build_model(name, model or Model(), node_names) for name, model in (file.models or {}).items())
        notify = tuple(self._build_notify(rule) for rule in file.notify or ())
        self.faults += find_nodes_without_host(pools, nodes)
        return Topology(file.name or DEFAULT_NAME, nodes, gateway, redis, source, tunnels, models, notify, pools)

    def _build_node(self, node: Node, defaults: NodeDefaults, path: KeyPath) -> NodeSpec:
        """Returns the spec of one node, with the defaults merged under it. ``path`` is where the node stands."""
        is_direct = node.ssh is None and node.address_from is None
        default_backend = drop_replaced_location(defaults.backend or Backend(), node.backend or Backend())
        return NodeSpec(
            name=node.name,
            backend=build_backend(merge(default_backend, node.backend or Backend())),
            ssh=None if is_direct else self._build_ssh(node, defaults.ssh or Ssh(), (*path, "ssh")),
            expect=build_expect(merge(defaults.expect or Expect(), node.expect or Expect())),
            weight=value_or(node.weight, value_or(defaults.weight, 1.0)),
            labels=MappingProxyType({**(defaults.labels or {}), **(node.labels or {})}),
            enabled=value_or(node.enabled, value_or(defaults.enabled, True)),
            tier=value_or(node.tier, value_or(defaults.tier, 1)),
            eur_per_hour=value_or(node.eur_per_hour, defaults.eur_per_hour),
        )

    def _build_ssh(self, node: Node, defaults: Ssh, path: KeyPath) -> SshSpec:
        """Returns the SSH spec of a node. ``path`` is where its section ``ssh`` stands.

        A setting of the node takes precedence over a setting of its alias, which takes precedence over a default of the
        file.
        """
        node_ssh = node.ssh or Ssh()
        alias = node_ssh.alias or defaults.alias
        alias_settings = self._read_alias_settings(alias, (*path, "alias")) if alias is not None else None
        settings = defaults
        if alias_settings is not None:
            settings = merge(settings, self._validate_alias(alias_settings, (*path, "alias")))
        settings = merge(settings, node_ssh)
        keys_of_alias = False
        if alias is not None and alias_settings is not None and node_ssh.identity_file is None:
            keys_of_alias = bool(alias_settings.raw_identity_files)
            settings = self._expand_alias_keys(settings, alias_settings, alias)
        more_known_hosts: tuple[str, ...] = ()
        if alias_settings is not None and node_ssh.known_hosts is None:
            more_known_hosts = alias_settings.more_known_hosts
        if alias_settings is not None and node_ssh.proxy_jump is None and alias_settings.proxy_jump:
            jumps = alias_settings
        else:
            jumps = self._read_jumps(settings.proxy_jump or (), (*path, "proxy_jump"))
        openssh_features = jumps.openssh_features
        if alias_settings is not None:
            openssh_features = tuple(dict.fromkeys((*alias_settings.openssh_features, *openssh_features)))
        address_from = node.address_from
        return SshSpec(
            host=settings.host or "",  # empty if only `address_from` knows the host
            port=value_or(settings.port, 22),
            user=settings.user or self.user,
            identity_files=self._choose_identity_files(settings),
            known_hosts=self._absolute_path(settings.known_hosts or "~/.ssh/known_hosts"),
            host_key_policy=value_or(settings.host_key_policy, HostKeyPolicy.STRICT),
            proxy_jump=jumps.proxy_jump,
            password_env=settings.password_env,
            passphrase_env=settings.passphrase_env,
            agent=value_or(settings.agent, True),
            identities_only=value_or(settings.identities_only, False),
            alias=alias,
            keys_of_alias=keys_of_alias,
            transport=self._choose_transport(settings, openssh_features, (*path, "transport")),
            connect_timeout_s=value_or(settings.connect_timeout, _DEFAULT_SSH.connect_timeout_s),
            keepalive_s=value_or(settings.keepalive, _DEFAULT_SSH.keepalive_s),
            address_from=None if address_from is None else self._build_address_command(address_from),
            more_known_hosts=tuple(self._absolute_path(file) for file in more_known_hosts),
            jump_aliases=tuple(self._build_jump_alias(hop) for hop in jumps.jump_aliases),
        )

    def _read_jumps(self, jumps: tuple[str, ...], path: KeyPath) -> AliasSettings:
        """Returns the settings of an alias with these jump hosts, each of which may be an alias itself. If one cannot
        be read, adds a fault at ``path``."""
        if self.resolve_alias is not None and jumps:
            try:
                return resolve_jumps(jumps, self.resolve_alias)
            except ValueError as error:
                self.faults.append(Fault(str(error), None, path))
        return AliasSettings("", proxy_jump=jumps)

    def _build_jump_alias(self, hop: AliasSettings | None) -> JumpAlias | None:
        """The files with which ssh logs in to a host of ProxyJump; ``None`` if the hop is no alias."""
        if hop is None:
            return None
        known_hosts = (hop.known_hosts, *hop.more_known_hosts) if hop.known_hosts is not None else ()
        return JumpAlias(
            hop.alias,
            tuple(self._absolute_path(file) for file in hop.identity_files),
            tuple(self._absolute_path(file) for file in known_hosts),
        )

    def _choose_identity_files(self, settings: Ssh) -> tuple[Path, ...]:
        """Returns the key files that the settings name. If they name neither a key file nor a password, returns the
        default key files; if they name a password alone, none."""
        if settings.identity_file is None and settings.password_env is None:
            return self.identities
        return tuple(self._absolute_path(file) for file in settings.identity_file or ())

    def _expand_alias_keys(self, settings: Ssh, alias_settings: AliasSettings, alias: str) -> Ssh:
        """Returns the settings with the key files of the alias for the host, port and user that are used in the end:
        a key of mesh.yaml may replace those of the alias."""
        if alias_settings.no_identity_files:
            return settings.replace(identity_file=())
        if not alias_settings.raw_identity_files:
            return settings
        paths = expand_identity_files(
            alias_settings.raw_identity_files,
            alias,
            self.home,
            host=settings.host or "",
            port=value_or(settings.port, 22),
            user=settings.user or self.user,
        )
        return settings.replace(identity_file=paths)

    def _read_alias_settings(self, alias: str, path: KeyPath) -> AliasSettings | None:
        """Returns the settings of ``alias``. If they cannot be read, returns ``None`` and adds a fault at ``path``."""
        if self.resolve_alias is None:
            return AliasSettings(host=alias)
        try:
            return self.resolve_alias(alias)
        except ValueError as error:
            self.faults.append(Fault(str(error), None, path))
            return None

    def _validate_alias(self, alias_settings: AliasSettings, path: KeyPath) -> Ssh:
        """Returns the settings of an alias as a section ``ssh``, validated by the schema of mesh.yaml. If they break
        the schema, returns an empty section and adds faults at ``path``."""
        values = {
            "host": alias_settings.host,
            "port": None if alias_settings.port is None else str(alias_settings.port),
            "user": alias_settings.user,
            "identity_file": list(alias_settings.identity_files) or None,
            "known_hosts": alias_settings.known_hosts,
            "proxy_jump": list(alias_settings.proxy_jump) or None,
            "identities_only": "true" if alias_settings.identities_only else None,
            "agent": None if alias_settings.agent else "false",
            "host_key_policy": HostKeyPolicy.ACCEPT_NEW.value if alias_settings.accepts_new_keys else None,
        }
        problems: list[ValueProblem] = []
        section = SectionOf(Ssh).read(values, (), problems)
        for problem in problems:
            key, *_ = problem.path
            self.faults.append(Fault(f"in ~/.ssh/config its {key} {problem.reason}", None, path))
        return section or Ssh()

    def _choose_transport(self, settings: Ssh, openssh_features: tuple[str, ...], path: KeyPath) -> TransportKind:
        """Returns the transport that the file names. If the file names none, returns the transport that supports the
        alias: ``openssh_features`` are those that only the system's ssh supports.

        If the file names a transport that does not support the alias, `config check` reports that, and the features of
        the alias are ignored. Only a ProxyCommand cannot be ignored: without it, a connection would reach another
        machine or no machine. So it is a fault at ``path``.
        """
        if settings.transport is None:
            return TransportKind.OPENSSH if openssh_features else TransportKind.SSHTUNNEL
        if settings.transport is TransportKind.SSHTUNNEL and "ProxyCommand" in openssh_features:
            owner = "a jump host" if settings.alias is None else repr(settings.alias)
            message = f"sshtunnel cannot run the ProxyCommand of {owner} in ~/.ssh/config: write openssh"
            self.faults.append(Fault(message, None, path))
        return settings.transport

    def _build_address_command(self, address_from: AddressFrom) -> AddressCommand:
        """Returns the command of ``address_from``."""
        command = self._resolve_program(address_from.command)
        return AddressCommand(command, value_or(address_from.timeout, _DEFAULT_ADDRESS.timeout_s))

    def _resolve_program(self, command: tuple[str, ...]) -> tuple[str, ...]:
        """Returns a command of the user. A program with a path gets its absolute path; a plain name is looked up in
        PATH when the command runs."""
        program, *arguments = command
        if program.startswith("~") or "/" in program:
            program = str(self._absolute_path(program))
        return (program, *arguments)

    def _build_notify(self, rule: Notify) -> NotifySpec:
        """Returns one rule of ``notify``. A value that the file does not give gets the default of ``NotifySpec``."""
        default = NotifySpec()
        return NotifySpec(
            webhook=rule.webhook,
            webhook_env=rule.webhook_env,
            command=() if rule.command is None else self._resolve_program(rule.command),
            desktop=value_or(rule.desktop, False),
            token_env=rule.token_env,
            format=value_or(rule.format, default.format),
            on=default.on if rule.on is None else frozenset(rule.on),
            quiet_s=value_or(rule.quiet, default.quiet_s),
        )

    def _build_gateway(self, gateway: Gateway) -> GatewaySpec:
        """Returns the gateway's spec. A value that the file does not give gets the default of ``GatewaySpec``."""
        default = GatewaySpec()
        host, port, socket = default.host, default.port, None
        if gateway.listen is not None:
            host = None  # without HOST:PORT in the list, the gateway listens on the Unix socket only
            for address in gateway.listen:
                if isinstance(address, str):
                    socket = self._socket_path(address)
                else:
                    host, port = address
        return GatewaySpec(
            host=host,
            port=port,
            socket=socket,
            api_key_env=gateway.api_key_env,
            default_model=gateway.default_model,
            policy=value_or(gateway.policy, PolicyKind.ADAPTIVE),
            max_queue=value_or(gateway.max_queue, default.max_queue),
            body_memory_mib=value_or(gateway.body_memory_mib, default.body_memory_mib),
            timeout_s=value_or(gateway.timeout, default.timeout_s),
            cors_origins=gateway.cors_origins or (),
            access_log=value_or(gateway.access_log, default.access_log),
            keys=tuple(self._build_key(key) for key in gateway.keys or ()),
            route_priority=MappingProxyType(gateway.route_priority or {}),
            heartbeat_s=MappingProxyType({**default.heartbeat_s, **(gateway.heartbeat or {})}),
            reload=value_or(gateway.reload, default.reload),
        )

    def _build_key(self, key: ApiKey) -> KeySpec:
        return KeySpec(
            name=key.name,
            env=key.env,
            sha256=key.hash,
            priority=key.priority,
            nodes=key.nodes,
            models=key.models,
            file=None if key.file is None else self._absolute_path(key.file),
            rate=key.rate,
            tokens_per_month=key.tokens_per_month,
        )

    def _socket_path(self, text: str) -> Path:
        """Returns the absolute path of the gateway's socket. Adds a fault if that path is too long for a socket."""
        path = self._absolute_path(text)
        try:
            listen_address.check_socket_path(str(path))
        except ValueError as error:
            self.faults.append(Fault(f"{path} {error}", None, ("gateway", "listen")))
        return path

    def _build_redis(self, redis: Redis) -> RedisSpec:
        ca_file = None if redis.ca_file is None else str(self._absolute_path(redis.ca_file))
        return RedisSpec(redis.url, redis.password_env, ca_file, redis.sentinel_password_env)

    def _absolute_path(self, text: str) -> Path:
        """Returns the path from ``home`` if it begins with ``~``, else from ``base`` unless it is absolute."""
        if text == "~" or text.startswith("~/"):
            return self.home / text.removeprefix("~").lstrip("/")
        return self.base / text
