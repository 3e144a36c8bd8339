"""``SyncMeshClient``: the mesh for scripts and notebooks, a ``MeshClient`` in a thread with its own event loop."""

from __future__ import annotations

import atexit
from collections.abc import AsyncIterable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from gpumesh.library import other_clients
from gpumesh.library.arguments import Format
from gpumesh.library.batch import Prompt
from gpumesh.library.client import MeshClient
from gpumesh.library.images import Image
from gpumesh.library.messages import Message, Messages, ToolCall
from gpumesh.library.reply import Reply
from gpumesh.library.results import BatchResult, Completion, Embeddings, FleetModel, ReplyChunk
from gpumesh.library.tools import Tool
from gpumesh.state import MeshState
from gpumesh.topology import Priority
from gpumesh.tunnels.loop_thread import LoopThread

if TYPE_CHECKING:
    import ollama
    import openai

T = TypeVar("T")


def connect_sync(config: str | Path | None = None, *, api_key: str | None = None) -> SyncMeshClient:
    """As ``connect``, for programs without asyncio: a plain ``with``. Also for notebooks, where a loop runs already;
    there ``open`` and ``close`` go into cells of their own."""
    return SyncMeshClient(config, api_key=api_key)


class SyncReply:
    """The answer to one request. Nothing is sent before it is used: ``text`` and the other properties wait for the
    whole answer, and iterating yields its pieces as they come. All raise GPUMeshError if the request fails."""

    def __init__(self, reply: Reply, thread: LoopThread) -> None:
        self._reply = reply
        self._thread = thread

    def __repr__(self) -> str:
        return f"<Sync{repr(self._reply)[1:]}"

    def __str__(self) -> str:
        return self.text

    def __iter__(self) -> Iterator[ReplyChunk]:
        chunks = aiter(self._reply)
        try:
            while True:
                chunk = self._thread.call(_next_or_none(chunks))
                if chunk is None:
                    return
                yield chunk
        finally:  # an early exit stops the generation on the host
            if self._thread.is_running:  # else the mesh was closed first, which has ended all requests
                self._thread.call(self._reply.aclose())

    def result(self) -> Completion:
        """The whole answer."""
        return self._thread.call(_wait(self._reply))

    def json(self) -> Any:
        """The whole text, read as JSON. Raises ValueError if it is none."""
        return self.result().json()

    @property
    def text(self) -> str:
        return self.result().text

    @property
    def thinking(self) -> str:
        return self.result().thinking

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.result().tool_calls

    @property
    def message(self) -> Message:
        """The answer as a message, for the next turn of the chat."""
        return self.result().message

    @property
    def node(self) -> str | None:
        """The name of the node that answers; ``None`` before the first piece."""
        return self._reply.node

    @property
    def completion(self) -> Completion | None:
        """The whole answer if it has been read to its end, else ``None``. Does not wait."""
        return self._reply.completion


async def _next_or_none(items: Any) -> Any:
    """The next item; ``None`` at the end. StopAsyncIteration must not leave a coroutine."""
    return await anext(items, None)


async def _wait(reply: Reply) -> Completion:
    return await reply


class SyncMeshClient:
    """A mesh, inside ``with``, or between ``open`` and ``close``. Any thread may call its methods, also several."""

    def __init__(self, config: str | Path | None = None, *, api_key: str | None = None) -> None:
        self._mesh = MeshClient(config, api_key=api_key)
        self._thread: LoopThread | None = None

    def __repr__(self) -> str:
        return f"<Sync{repr(self._mesh)[1:]}"

    # -- lifetime ------------------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Opens the mesh, as entering the ``with`` block does. The program's end closes it. Raises the errors of
        ``connect``."""
        if self._thread is not None:
            raise RuntimeError("this connection is open already; gpumesh.connect_sync() makes another one")
        thread = LoopThread("gpumesh")
        thread.start()
        self._thread = thread
        try:
            thread.enter(self._mesh)
        except BaseException:
            self._thread = None
            thread.stop()
            raise
        atexit.register(self.close)
        return self

    def close(self) -> None:
        """Closes the mesh. May be called twice."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        atexit.unregister(self.close)
        try:
            thread.leave()
        finally:
            thread.stop()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_thread(self) -> LoopThread:
        if self._thread is None:
            raise RuntimeError("the mesh is not open: `with gpumesh.connect_sync() as mesh:`")
        return self._thread

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs the coroutine on the loop of the client's thread, and returns its result."""
        try:
            thread = self._require_thread()
        except RuntimeError:
            work.close()  # else Python warns that it was never awaited
            raise
        return thread.call(work)

    @property
    def is_joined(self) -> bool:
        """Whether this is a mesh that ran already (``gpumesh up``); else it runs in this process."""
        return self._mesh.is_joined

    @property
    def url(self) -> str:
        """The address of the gateway: ``http://HOST:PORT``, or ``unix:PATH``."""
        return self._mesh.url

    # -- requests ------------------------------------------------------------------------------------------------

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
    ) -> SyncReply:
        """As ``MeshClient.chat``. The result has ``text``, and yields the pieces of the answer in a ``for`` loop."""
        reply = self._mesh.chat(
            model,
            messages,
            tools=tools,
            format=format,
            options=options,
            think=think,
            keep_alive=keep_alive,
            priority=priority,
            node=node,
            session=session,
            timeout=timeout,
            resume=resume,
        )
        return SyncReply(reply, self._require_thread())

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
    ) -> SyncReply:
        """As ``MeshClient.generate``."""
        reply = self._mesh.generate(
            model,
            prompt,
            system=system,
            images=images,
            format=format,
            options=options,
            think=think,
            keep_alive=keep_alive,
            priority=priority,
            node=node,
            session=session,
            timeout=timeout,
            resume=resume,
        )
        return SyncReply(reply, self._require_thread())

    def embed(
        self,
        model: str,
        input: str | Iterable[str],  # noqa: A002 - Ollama's name
        *,
        options: Mapping[str, Any] | None = None,
        priority: Priority | str = Priority.NORMAL,
        node: str | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """As ``MeshClient.embed``."""
        return self._call(
            self._mesh.embed(model, input, options=options, priority=priority, node=node, timeout=timeout)
        )

    def run_many(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
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
    ) -> Iterator[BatchResult]:
        """As ``MeshClient.run_many``. An iterable of prompts is read in the client's own thread."""
        results = self._mesh.run_many(
            prompts,
            model=model,
            ordered=ordered,
            concurrency=concurrency,
            format=format,
            options=options,
            think=think,
            priority=priority,
            node=node,
            timeout=timeout,
        )
        return self._iterate(results, self._require_thread())

    def _iterate(self, results: Any, thread: LoopThread) -> Iterator[BatchResult]:
        """Yields the results, which come on the loop of ``thread``."""
        try:
            while True:
                result = thread.call(_next_or_none(results))
                if result is None:
                    return
                yield result
        finally:  # an early exit cancels the prompts under way
            if thread.is_running:
                thread.call(results.aclose())

    def models(self) -> tuple[FleetModel, ...]:
        """As ``MeshClient.models``."""
        return self._call(self._mesh.models())

    def status(self) -> MeshState:
        """As ``MeshClient.status``."""
        return self._call(self._mesh.status())

    # -- clients of other packages -------------------------------------------------------------------------------

    def openai_client(self, **settings: Any) -> openai.OpenAI:
        """An ``openai.OpenAI`` set to this mesh, while it is open. ``settings`` are more arguments of it. Raises
        GPUMeshError with the command that installs the package if it is missing."""
        return other_clients.make_openai(self._mesh.address, settings)

    def ollama_client(self, **settings: Any) -> ollama.Client:
        """An ``ollama.Client`` set to this mesh. As ``openai_client``."""
        return other_clients.make_ollama(self._mesh.address, settings)
