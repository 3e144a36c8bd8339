"""``MeshClient``: the mesh for asyncio programs, as ``gpumesh.connect`` returns it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from gpumesh.daemon.sessions.prompt_sender import default_concurrency
from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.library import arguments, batch, mesh_access, other_clients
from gpumesh.library.arguments import Ask, Format, Steering, read_steering
from gpumesh.library.embedding import embed_texts
from gpumesh.library.gateway_link import GatewayAddress, GatewayLink
from gpumesh.library.images import Image
from gpumesh.library.mesh_access import MeshAccess, ModelKinds
from gpumesh.library.messages import Message, Messages, read_messages
from gpumesh.library.reply import Reply, Route
from gpumesh.library.results import BatchResult, Embeddings, FleetModel, list_models
from gpumesh.library.tools import Tool, read_tools
from gpumesh.state import MeshState
from gpumesh.topology import Priority

if TYPE_CHECKING:
    import ollama
    import openai


def connect(config: str | Path | None = None, *, api_key: str | None = None) -> MeshClient:
    """The mesh of a mesh.yaml, to be used with ``async with``. ``config``: the file; ``None``: the one that the command
    line finds ($GPUMESH_CONFIG, ./mesh.yaml, the user's own). ``api_key``: instead of the variable that the file names.

    If a mesh runs for this file, the program joins it. Otherwise one is opened in this process, for the time of the
    block. Entering the block raises UsageError without a file, and ConfigError with all problems of the file.
    """
    return MeshClient(config, api_key=api_key)


class _OpenMesh(NamedTuple):
    """What a client has while it is open."""

    access: MeshAccess
    link: GatewayLink
    model_kinds: ModelKinds
    tasks: asyncio.TaskGroup


class MeshClient:
    """A mesh, inside ``async with``. All methods may be called from many tasks at the same time."""

    def __init__(self, config: str | Path | None = None, *, api_key: str | None = None) -> None:
        self._config = mesh_access.read_path(config)
        self._api_key = None if api_key is None else arguments.read_text("api_key", api_key)
        self._stack = AsyncExitStack()
        self._open_mesh: _OpenMesh | None = None

    def __repr__(self) -> str:
        if self._open_mesh is None:
            return "<MeshClient not open>"
        access = self._open_mesh.access
        kind = "joined" if access.own_mesh is None else "own mesh"
        return f"<MeshClient {access.topology.name} {kind}>"

    # -- lifetime ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._open_mesh is not None:
            raise RuntimeError("this connection is open already; gpumesh.connect() makes another one")
        file = mesh_access.find_file(self._config)
        async with AsyncExitStack() as stack:
            access = await mesh_access.open_access(file, self._api_key, stack)
            link = GatewayLink(access.address)
            stack.push_async_callback(link.aclose)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            self._stack = stack.pop_all()
        self._open_mesh = _OpenMesh(access, link, ModelKinds(access), tasks)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_mesh = None
        if isinstance(error, Exception):
            await self._stack.aclose()  # the task group would wrap the block's error in an ExceptionGroup
        else:
            await self._stack.__aexit__(kind, error, trace)

    @property
    def is_joined(self) -> bool:
        """Whether this is a mesh that ran already (``gpumesh up``); else it runs in this process."""
        return self._require_open().access.own_mesh is None

    @property
    def url(self) -> str:
        """The address of the gateway: ``http://HOST:PORT``, or ``unix:PATH``."""
        address = self.address
        return address.base_url if address.socket is None else f"unix:{address.socket}"

    @property
    def address(self) -> GatewayAddress:
        """Where the gateway is, with the key."""
        return self._require_open().access.address

    def _require_open(self) -> _OpenMesh:
        if self._open_mesh is None:
            raise RuntimeError("the mesh is not open: `async with gpumesh.connect() as mesh:`")
        return self._open_mesh

    # -- texts ---------------------------------------------------------------------------------------------------

    def chat(
        self,
        model: str | None,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        format: Format | None = None,  # noqa: A002 - Ollama's name
        options: Mapping[str, Any] | None = None,
        think: bool | str | None = None,
        keep_alive: str | float | None = None,
        priority: Priority | str = Priority.NORMAL,
        node: str | None = None,
        session: str | None = None,
        timeout: float | None = None,
        resume: bool = True,
    ) -> Reply:
        """Asks a model for the next message of a chat. ``await`` the result, or read it with ``async for``.

        ``model``: ``None`` stands for the default model of mesh.yaml, or the fleet's only one. ``options`` have
        Ollama's names (``temperature``, ``num_predict``, ``num_ctx`` …). ``timeout`` is in seconds, waiting included;
        ``None``: ``gateway.timeout`` of mesh.yaml. ``resume``: another node continues an answer that is cut.

        Raises TypeError and ValueError for wrong arguments, at once. The result raises GPUMeshError.
        """
        ask = Ask(
            messages=read_messages(messages),
            model=arguments.read_model(model),
            tools=tuple(read_tools(tools or ())),
            format=arguments.read_format(format),
            options=arguments.read_options(options),
            think=arguments.read_think(think),
            keep_alive=arguments.read_keep_alive(keep_alive),
        )
        steering = read_steering(priority=priority, node=node, session=session, timeout=timeout, resume=resume)
        return self._ask(ask, steering)

    def generate(
        self,
        model: str | None,
        prompt: str,
        *,
        system: str | None = None,
        images: Sequence[Image] = (),
        format: Format | None = None,  # noqa: A002 - Ollama's name
        options: Mapping[str, Any] | None = None,
        think: bool | str | None = None,
        keep_alive: str | float | None = None,
        priority: Priority | str = Priority.NORMAL,
        node: str | None = None,
        session: str | None = None,
        timeout: float | None = None,
        resume: bool = True,
    ) -> Reply:
        """Asks a model to answer one prompt. The arguments and errors are those of ``chat``."""
        messages = [Message("user", arguments.read_text("prompt", prompt), images)]
        if system is not None:
            messages.insert(0, Message("system", arguments.read_text("system", system)))
        ask = Ask(
            messages=read_messages(messages),
            model=arguments.read_model(model),
            is_chat=False,
            format=arguments.read_format(format),
            options=arguments.read_options(options),
            think=arguments.read_think(think),
            keep_alive=arguments.read_keep_alive(keep_alive),
        )
        steering = read_steering(priority=priority, node=node, session=session, timeout=timeout, resume=resume)
        return self._ask(ask, steering)

    def _ask(self, ask: Ask, steering: Steering) -> Reply:
        return Reply(self._require_open().link, ask, steering, self._find_route)

    async def _find_route(self, ask: Ask, steering: Steering) -> Route:
        """The model of a request and its API (Ollama's or OpenAI's), as soon as the mesh can serve it. Raises
        GPUMeshError."""
        access, _, model_kinds, _ = self._require_open()
        model = ask.model or await access.default_model(steering.node)
        await access.wait_usable(model, node=steering.node, timeout_s=steering.timeout_s)
        return Route(model, await model_kinds.is_native(model))

    # -- vectors -------------------------------------------------------------------------------------------------

    async def embed(
        self,
        model: str,
        input: str | Iterable[str],  # noqa: A002 - Ollama's name
        *,
        options: Mapping[str, Any] | None = None,
        priority: Priority | str = Priority.NORMAL,
        node: str | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """The vectors of a text, or of each of several texts. Raises TypeError, ValueError and GPUMeshError."""
        texts = arguments.read_input(input)
        ask = Ask((), arguments.read_text("model", model), options=arguments.read_options(options))
        steering = read_steering(priority=priority, node=node, timeout=timeout)
        route = await self._find_route(ask, steering)
        return await embed_texts(self._require_open().link, route, texts, ask.options, steering)

    # -- many prompts --------------------------------------------------------------------------------------------

    def run_many(
        self,
        prompts: Iterable[batch.Prompt] | AsyncIterable[batch.Prompt],
        *,
        model: str | None = None,
        ordered: bool = True,
        concurrency: int | None = None,
        format: Format | None = None,  # noqa: A002 - Ollama's name
        options: Mapping[str, Any] | None = None,
        think: bool | str | None = None,
        priority: Priority | str = Priority.BATCH,
        node: str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[BatchResult]:
        """Sends many prompts, and yields a result for each: in their order, or as they end (``ordered=False``).

        ``prompts`` may be endless: only a few are read ahead of the results that were taken. ``concurrency``: so many
        at a time; ``None``: 8 for each node that is up. A prompt that fails is a result with its ``error``; a full
        queue is waited for. ``timeout`` is for each prompt. Raises TypeError and ValueError for wrong arguments.
        """
        batch.require_prompts(prompts, concurrency)
        common = {
            "model": arguments.read_model(model),
            "format": format,
            "options": options,
            "think": think,
            "priority": priority,
            "node": node,
            "timeout": timeout,
        }
        read_steering(priority=priority, node=node, timeout=timeout)  # raises at once, not at the first prompt
        return self._run_many(prompts, common, ordered=ordered, concurrency=concurrency)

    async def _run_many(
        self, prompts: object, common: Mapping[str, Any], *, ordered: bool, concurrency: int | None
    ) -> AsyncIterator[BatchResult]:
        """Sends the prompts, ``concurrency`` at a time, and yields their results. ``None``: as many as the nodes can
        take."""
        tasks = self._require_open().tasks
        if concurrency is None:
            nodes = {node for model in await self.models() for node in model.nodes}
            concurrency = default_concurrency(len(nodes))
        async with closing_iterator(batch.iterate(prompts)) as source:
            results = batch.run_prompts(
                source,
                lambda prompt: self.chat(**batch.read_prompt(prompt, common)),
                group=tasks,
                concurrency=concurrency,
                ordered=ordered,
            )
            async with closing_iterator(results) as closing:
                async for result in closing:
                    yield result

    # -- the fleet -----------------------------------------------------------------------------------------------

    async def models(self) -> tuple[FleetModel, ...]:
        """The models of all nodes that are up, by name. Raises GPUMeshError."""
        return list_models(await self.status())

    async def status(self) -> MeshState:
        """The state of the mesh, as `gpumesh status --json` shows it. Nodes that were just opened get up to 10 s
        for their first report. Raises GPUMeshError."""
        return await self._require_open().access.first_report()

    # -- clients of other packages -------------------------------------------------------------------------------

    def openai_client(self, **settings: Any) -> openai.AsyncOpenAI:
        """An ``openai.AsyncOpenAI`` set to this mesh, while it is open. ``settings`` are more arguments of it. Raises
        GPUMeshError with the command that installs the package if it is missing."""
        return other_clients.make_async_openai(self.address, settings)

    def ollama_client(self, **settings: Any) -> ollama.AsyncClient:
        """An ``ollama.AsyncClient`` set to this mesh. As ``openai_client``."""
        return other_clients.make_async_ollama(self.address, settings)
