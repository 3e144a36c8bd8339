"""Joins the running mesh of a mesh.yaml, or opens one in this process; both look the same to the client."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from gpumesh import config
from gpumesh.backends.dialects import kinds_that_serve
from gpumesh.config.credentials import is_secret_set, read_secret
from gpumesh.config.listen_address import UNIX_PREFIX
from gpumesh.daemon import leftovers
from gpumesh.daemon.control_socket.quick_status import fetch_status
from gpumesh.daemon.control_socket.remote_session import RemoteSession
from gpumesh.daemon.paths import for_config
from gpumesh.daemon.sessions.local_session import FIRST_NODE_TIMEOUT_S, LocalSession
from gpumesh.daemon.sessions.session import Session
from gpumesh.errors import MeshNotRunning, UsageError
from gpumesh.gateway.app import Gateway
from gpumesh.library.gateway_link import GatewayAddress
from gpumesh.mesh.learned_state import LearnedState
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.models.default_model import choose_model
from gpumesh.state import MeshState
from gpumesh.topology import GatewaySpec, Topology
from gpumesh.tunnels.local_system.socket_folders import private_folder

FIRST_REPORT_TIMEOUT_S = 10.0  # the status, the models and the default model wait so long for slow nodes
_NATIVE_KINDS = kinds_that_serve("/api/chat")
KIND_VALID_S = 30.0  # so long it is remembered which API a model needs


@dataclass(frozen=True, slots=True)
class MeshAccess:
    """A mesh, as the client uses it. ``own_mesh`` is set if it runs in this process, for this client."""

    topology: Topology
    session: Session
    address: GatewayAddress
    own_mesh: Mesh | None = None

    async def wait_usable(self, model: str, *, node: str | None, timeout_s: float | None) -> None:
        """Waits until the own mesh can serve this model: its nodes are perhaps just connecting. A mesh that was joined
        decides itself. Raises NoNodeError, ModelMissing and UsageError."""
        if self.own_mesh is not None:
            limit_s = min(timeout_s or FIRST_NODE_TIMEOUT_S, FIRST_NODE_TIMEOUT_S)
            await self.own_mesh.wait_usable(model, timeout_s=limit_s, node=node)

    async def default_model(self, node: str | None) -> str:
        """The model for a request that names none. Raises UsageError and NoNodeError."""
        default = self.topology.gateway.default_model
        if default is not None:
            return default
        return choose_model(await self.first_report(), node)

    async def first_report(self) -> MeshState:
        """The state, as soon as each node was probed or is known to be out of reach, at the latest after
        ``FIRST_REPORT_TIMEOUT_S``."""
        return await self.session.wait_first_report(FIRST_REPORT_TIMEOUT_S)


class ModelKinds:
    """Knows which models need OpenAI's API, because no Ollama server of the mesh has them."""

    def __init__(self, access: MeshAccess) -> None:
        self._access = access
        # By the name of the model: whether an Ollama server has it.
        self._native: MappingProxyType[str, bool] = MappingProxyType({})
        self._read_at = float("-inf")

    async def is_native(self, model: str) -> bool:
        """Whether a request for this model goes in Ollama's own API."""
        kinds = {node.backend.kind for node in self._access.topology.nodes if node.enabled}
        if kinds <= _NATIVE_KINDS:
            return True
        now = asyncio.get_running_loop().time()
        if model not in self._native or now - self._read_at > KIND_VALID_S:
            state = await self._access.first_report()
            self._read_at = now
            native: dict[str, bool] = {}
            for node in state.nodes:
                for name in node.backend.models:
                    native[name] = native.get(name, False) or node.backend.kind in _NATIVE_KINDS
            self._native = MappingProxyType(native)
            if model not in native:  # another name of a model, or one that is missing: any server can be meant
                has_ollama = any(node.backend.kind in _NATIVE_KINDS for node in state.nodes)
                self._native = MappingProxyType({**native, model: has_ollama})
        return self._native[model]


def read_path(path: object) -> Path | None:
    """The path that a program gives for its mesh.yaml; ``None`` if it gives none. Raises TypeError."""
    if path is not None and not isinstance(path, str | Path):
        raise TypeError(f"config is the path of a mesh.yaml, not {type(path).__name__}")
    return None if path is None else Path(path)


def find_file(path: object) -> Path:
    """The mesh.yaml to use. Raises TypeError and UsageError."""
    return config.find_config(read_path(path))


async def open_access(file: Path, api_key: str | None, stack: AsyncExitStack) -> MeshAccess:
    """Joins the mesh that runs for this file, else opens one until ``stack`` is closed. Raises ConfigError, UsageError
    and SecretMissing."""
    topology = config.load(file)
    paths = for_config(file)
    session = RemoteSession(paths.socket)
    try:
        url = (await session.status()).gateway.url
    except MeshNotRunning:
        pass
    else:
        address = GatewayAddress(_require_url(url), api_key or find_api_key(topology.gateway))
        return MeshAccess(topology, session, address)
    leftovers.remove_leftovers()
    folder = stack.enter_context(private_folder())
    socket = folder / "gateway.sock"
    # Nobody but this user can open the socket, so no key is asked for, and nothing is written to the usage of others.
    spec = replace(topology.gateway, host=None, port=0, socket=socket, api_key_env=None, keys=())
    private = replace(topology, gateway=spec)
    mesh = await stack.enter_async_context(Mesh(private, learned=LearnedState(paths.learned, read_only=True)))
    await stack.enter_async_context(Gateway(mesh, drain_s=0.0))
    return MeshAccess(private, LocalSession(mesh), GatewayAddress(f"{UNIX_PREFIX}{socket}", None), mesh)


def running_address(file: Path, api_key: str | None) -> GatewayAddress:
    """The gateway of the mesh that runs for this file. Raises MeshNotRunning, ConfigError and UsageError."""
    status = fetch_status(for_config(file).socket)
    if status is None:
        raise MeshNotRunning(
            "no mesh is running for this configuration",
            hint="`gpumesh up -d` starts it; in a mesh of the program's own, use `mesh.openai_client()` and the like",
        )
    url = _require_url(status.get("gateway", {}).get("url"))
    return GatewayAddress(url, api_key or find_api_key(config.load(file).gateway))


def _require_url(url: object) -> str:
    if not isinstance(url, str) or not url:
        raise MeshNotRunning("the running mesh has no gateway yet, or is stopping")
    return url


def find_api_key(spec: GatewaySpec) -> str | None:
    """The key by the variables that mesh.yaml names; ``None`` if it needs none. Raises UsageError if none is set."""
    if not spec.needs_key:
        return None
    for variable in spec.key_variables:
        if is_secret_set(variable):
            return read_secret(variable)
    named = " or ".join(spec.key_variables) or "none, as mesh.yaml has hashes of keys only"
    raise UsageError(
        f"the gateway needs a key, and no variable with one is set (mesh.yaml names {named})",
        hint="set the variable, or pass the key: gpumesh.connect(api_key=…)",
    )
