"""Pulls, creates, copies, deletes and pushes models on several nodes, or on one: for the gateway's /api routes.

A caller may name one node: then the operation is for this node only. Otherwise:

- ``pull`` is done on every node with a model store that can be used now. It is complete when all of them have the
  model.
- ``create`` is done on every node that has the parts of the model: all blobs of ``files`` and ``adapters``, else the
  model that ``from`` names. If no node has these parts, it is done on all nodes, which fetch the parts as Ollama does.
- ``copy`` is done on every node that has the source. So the new name works on the same nodes as the source.
- ``delete`` is done on every node that has the model. If such a node cannot be reached, the model is deleted from the
  other nodes, and the result is an error: the model would come back with this node.
- ``unload`` is done on every node that has the model. A node that cannot be reached, and had the model in its memory
  when it was seen last, makes the result an error.
- ``push`` is done from one node that has the model.
- A blob, which only ``create`` uses, is sent to the nodes that lack it while it is still being received.

A result says on which nodes the operation succeeded and on which it did not. Before it returns the result, the mesh
asks the stores again: so a chat with a model that was just pulled finds the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpumesh.backends.base import HttpCall
from gpumesh.backends.dialects import KINDS_WITH_MODEL_STORE
from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.select import allows_node, has_model, no_node_error
from gpumesh.errors import BackendError, GPUMeshError, NoNodeError
from gpumesh.mesh.models.blob_upload import upload_to_nodes
from gpumesh.mesh.models.inventory import is_embedder_on
from gpumesh.mesh.models.merged_progress import MergedProgress
from gpumesh.mesh.models.model_store import OPERATION_TIMEOUT_S, ModelStore, json_call, over_mesh
from gpumesh.mesh.models.store_answers import (
    NodeResult,
    StoreRefusal,
    StoreStep,
    answered_result,
    failed_result,
    read_body,
)
from gpumesh.mesh.models.url_stores import open_url_stores
from gpumesh.text.model_names import full_name

if TYPE_CHECKING:
    from gpumesh.mesh.mesh import Mesh

BLOB_CHECK_TIMEOUT_S = 30.0
MAX_PULL_ATTEMPTS = 5  # on one node; Ollama continues where the last attempt was cut
RETRY_PAUSE_S = 1.0  # the pause before the second attempt; it doubles before each further attempt
BLOBS_PATH = "/api/blobs/"


@dataclass(frozen=True, slots=True)
class BlobHolders:
    """The nodes that have a blob, the nodes that lack it, and the results of the nodes that gave no usable answer
    (``unsure``). Such a node must not prevent the upload to the other nodes."""

    having: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    unsure: list[NodeResult] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class OperationResult:
    """How an operation with progress ended on its ``nodes``. ``done``: the nodes on which it has succeeded.
    ``failures``: the reasons by node, of the nodes on which it has failed. ``refusal``: the first refusal that a server
    sent with an HTTP status; ``None`` if no server did."""

    nodes: tuple[str, ...]
    done: tuple[str, ...]
    failures: Mapping[str, str]
    refusal: StoreRefusal | None = None

    @property
    def common_failure(self) -> str | None:
        """The reason if the operation failed on all nodes for the same reason, else ``None``."""
        reasons = set(self.failures.values())
        failed_everywhere = len(self.failures) == len(self.nodes)
        has_one_reason = len(reasons) == 1
        return reasons.pop() if failed_everywhere and has_one_reason else None


class StoreOperation:
    """One ``pull``, ``push`` or ``create`` on several nodes at once. To be used so: iterate over ``steps`` to its end,
    then read ``result``.

    ``call`` is the request that each node gets, with a time-out of ``timeout_s``. It is sent to a node up to
    ``max_attempts`` times; ``pause_s`` is the pause before the second attempt."""

    def __init__(
        self,
        mesh: Mesh,
        nodes: Sequence[str],
        call: HttpCall,
        *,
        timeout_s: float = OPERATION_TIMEOUT_S,
        max_attempts: int = 1,
        pause_s: float = RETRY_PAUSE_S,
    ) -> None:
        self.nodes = tuple(nodes)
        self.progress = MergedProgress(nodes)
        self._mesh = mesh
        self._call = call
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._pause_s = pause_s
        self._changed = asyncio.Event()  # set when there are new steps, or a task has ended
        self._refusal: StoreRefusal | None = None  # the first answer of a node that refuses

    def __repr__(self) -> str:
        return f"<StoreOperation {self._call.path} {self.progress!r}>"

    async def steps(self) -> AsyncGenerator[list[StoreStep]]:
        """Starts the operation on all nodes, and yields the new steps of their merged progress. Closing the generator
        ends the operation."""
        tasks = [
            asyncio.create_task(self._run_on_node(node), name=f"{self._call.path} on {node}") for node in self.nodes
        ]
        for task in tasks:
            task.add_done_callback(lambda _: self._changed.set())
        self._changed.set()  # notes that were added before the start are yielded at once
        try:
            all_ended = False
            while not all_ended:
                await self._changed.wait()
                self._changed.clear()
                all_ended = all(task.done() for task in tasks)  # if so, the steps that follow are the last ones
                new_steps = self.progress.take_steps()
                if new_steps:
                    yield new_steps
            for task in tasks:
                task.result()  # no fault of a node makes a task raise; this raises the error of a bug of ours
            await self._mesh.refresh(self.progress.done)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def result(self) -> OperationResult:
        return OperationResult(self.nodes, self.progress.done, self.progress.failures, self._refusal)

    async def _run_on_node(self, node: str) -> None:
        """Runs the operation on one node, and adds its steps to the progress. If it does not succeed, marks the node as
        failed there. Sends the request up to ``max_attempts`` times, as long as another attempt may help."""
        store = ModelStore(node, over_mesh(self._mesh, node))
        reason = ""
        for attempt in range(self._max_attempts):
            if attempt > 0:  # not before the first
                await asyncio.sleep(self._pause_s * 2 ** (attempt - 1))
            try:
                async with aclosing(store.follow(self._call, timeout_s=self._timeout_s)) as steps:
                    async for step in steps:
                        self.progress.add_step(node, step)
                        self._changed.set()
            except StoreRefusal as error:  # a refusal is final
                if error.status is not None and self._refusal is None:
                    self._refusal = error
                reason = error.message
                break
            except BackendError as error:  # the server gave no answer, or the answer was cut: the next attempt may work
                reason = error.message
            except GPUMeshError as error:  # the request was not sent, for example because the node is not up
                reason = error.message
                break
            else:
                if node in self.progress.done:
                    return
                reason = "it ended before it was done"
        self.progress.mark_failed(node, reason)
        self._changed.set()


class FleetStore:
    """The model stores of a mesh that runs in this process. ``pause_s``: the pause before the second attempt of a
    pull."""

    def __init__(self, mesh: Mesh, *, pause_s: float = RETRY_PAUSE_S) -> None:
        self._mesh = mesh
        self._pause_s = pause_s

    # -- the nodes of an operation -------------------------------------------------------------------------------

    def _candidates(self) -> list[Candidate]:
        """All nodes with a model store that mesh.yaml enables."""
        enabled = {node.name for node in self._mesh.topology.nodes if node.enabled}
        return [
            candidate
            for candidate in self._mesh.candidates()
            if candidate.kind in KINDS_WITH_MODEL_STORE and candidate.name in enabled
        ]

    def usable_nodes(self, node: str | None) -> list[str]:
        """The nodes with a model store that can be used now; if ``node`` is given, only this node. Raises NoNodeError
        if there are none."""
        usable_names = [candidate.name for candidate in self._candidates() if candidate.usable]
        names = [name for name in usable_names if node in (None, name)]
        if not names:
            raise no_node_error(self._mesh.candidates(), Demand(None, KINDS_WITH_MODEL_STORE, node))
        return names

    def nodes_with(self, model: str, node: str | None) -> list[str]:
        """The usable nodes that have the model; if ``node`` is given, only this node. Raises NoNodeError if no node is
        usable, and ModelMissing if none of them has the model."""
        usable = {candidate.name: candidate for candidate in self._candidates() if candidate.usable}
        names = [name for name in self.usable_nodes(node) if has_model(usable[name], model)]
        if not names:
            raise no_node_error(self._mesh.candidates(), Demand(model, KINDS_WITH_MODEL_STORE, node))
        return names

    async def nodes_for_create(self, nodes: Sequence[str], digests: Collection[str], base: str | None) -> list[str]:
        """Chooses from ``nodes`` the nodes that have all blobs of ``digests``. Without ``digests``, chooses the nodes
        that have the model ``base``. If no node has them, returns all ``nodes``, which then fetch them as Ollama
        does."""
        chosen: list[str] = []
        if digests:
            chosen = await self._nodes_with_blobs(nodes, digests)
        elif base is not None:
            candidates = {candidate.name: candidate for candidate in self._candidates()}
            chosen = [name for name in nodes if has_model(candidates[name], base)]
        return chosen or list(nodes)

    # -- operations with progress --------------------------------------------------------------------------------

    def start_pull(self, call: HttpCall, node: str | None, *, timeout_s: float) -> StoreOperation:
        """A pull to ``node``, by default to all nodes that can be used now. The progress names the nodes that are left
        out. Raises NoNodeError."""
        operation = StoreOperation(
            self._mesh,
            self.usable_nodes(node),
            call,
            timeout_s=timeout_s,
            max_attempts=MAX_PULL_ATTEMPTS,
            pause_s=self._pause_s,
        )
        if node is None:
            for candidate in self._candidates():
                if not candidate.usable:
                    operation.progress.add_note(f"{candidate.name} cannot be used now and is left out")
        return operation

    def start_push(self, call: HttpCall, model: str, node: str | None, *, timeout_s: float) -> StoreOperation:
        """A push from the first usable node that has the model. Raises NoNodeError and ModelMissing."""
        return StoreOperation(self._mesh, self.nodes_with(model, node)[:1], call, timeout_s=timeout_s)

    def start_create(self, call: HttpCall, nodes: Sequence[str], *, timeout_s: float) -> StoreOperation:
        """A create on ``nodes``, which the caller gets from ``nodes_for_create``."""
        return StoreOperation(self._mesh, nodes, call, timeout_s=timeout_s)

    # -- copy and delete -----------------------------------------------------------------------------------------

    async def copy(self, call: HttpCall, source: str, node: str | None, *, timeout_s: float) -> list[NodeResult]:
        """Copies a model on each node that has it, and returns the results, one for each node. Raises NoNodeError and
        ModelMissing."""
        return await self._change_stores(self.nodes_with(source, node), call, timeout_s)

    async def delete(self, call: HttpCall, model: str, node: str | None, *, timeout_s: float) -> list[NodeResult]:
        """Deletes a model from each node that has it, and returns the results, one for each node. A node that has the
        model and cannot be reached has an error as its result. Raises NoNodeError and ModelMissing."""
        nodes = self.nodes_with(model, node)
        unreachable_results: list[NodeResult] = []
        if node is None:
            unusable = [candidate for candidate in self._candidates() if not candidate.usable]
            for candidate in unusable:
                # ``has_model`` alone would also be true for a node whose models are not known.
                is_listed = candidate.models is not None and has_model(candidate, model)
                if is_listed:
                    error = NoNodeError("it cannot be reached now", node=candidate.name)
                    unreachable_results.append(failed_result(candidate.name, error))
        results = await self._change_stores(nodes, call, timeout_s)
        return [*results, *unreachable_results]

    async def unload(
        self, model: str, node: str | None, *, allowed: Collection[str] | None, timeout_s: float
    ) -> list[NodeResult]:
        """Removes a model from the memory of each node that has it, and returns the results, one for each node.
        ``model`` is its name in the mesh. ``allowed``: only these nodes; ``None``: all.

        A draining node with the model in its memory also gets the request, although it gets no prompts. A node that had
        the model in its memory, but cannot be reached now, has an error as its result. Raises NoNodeError and
        ModelMissing."""
        demand = Demand(
            model, KINDS_WITH_MODEL_STORE, node, needs_slot=False, nodes=None if allowed is None else frozenset(allowed)
        )
        asked = [candidate for candidate in self._candidates() if allows_node(demand, candidate.name)]
        names = [candidate.name for candidate in asked if candidate.usable and has_model(candidate, model)]
        holders = [node.name for node in asked if not node.usable and self._is_in_memory(node.name, model)]
        if not names and not holders:
            raise no_node_error(self._mesh.candidates(), demand)
        reachable = [name for name in holders if self._mesh.fleet.find_node(name).reachable]
        stores = [ModelStore(name, over_mesh(self._mesh, name)) for name in names]
        async with AsyncExitStack() as stack:
            if reachable:  # past the mesh, which sends nothing to nodes that are not usable
                url_stores = await stack.enter_async_context(open_url_stores(self._mesh.topology))
                stores += [url_stores.of(self._mesh.fleet.find_node(name).state(queued=0)) for name in reachable]
            results = list(await asyncio.gather(*(self._unload_from(store, model, timeout_s) for store in stores)))
        await self._mesh.refresh(store.node for store in stores)
        away = [name for name in holders if name not in reachable]
        return results + [failed_result(name, NoNodeError("it cannot be reached now", node=name)) for name in away]

    async def _unload_from(self, store: ModelStore, model: str, timeout_s: float) -> NodeResult:
        """Makes one node unload the model. An embedding model that is not in memory gets no request, because the
        request to unload such a model would load it first."""
        node = self._mesh.fleet.find_node(store.node)
        name_at_server = node.server_name(model) or model
        document: dict[str, object] = {"model": name_at_server, "keep_alive": 0}
        if not is_embedder_on(node.state(queued=0), name_at_server):
            call = json_call("POST", "/api/generate", {**document, "stream": False})
        elif self._is_in_memory(store.node, model):
            call = json_call("POST", "/api/embed", {**document, "input": []})
        else:
            return NodeResult(store.node, 200)
        result = await store.request(call, timeout_s=timeout_s)
        if result.done:
            node.note_unloaded(full_name(model))
        return result

    def _is_in_memory(self, name: str, model: str) -> bool:
        """Whether the node had the model in its memory when it was seen last."""
        return full_name(model) in self._mesh.fleet.find_node(name).account.residency.loaded

    async def _change_stores(self, nodes: Sequence[str], call: HttpCall, timeout_s: float) -> list[NodeResult]:
        """Sends a request that changes the stores, then asks the nodes which models they have now."""
        results = await self._request_each(nodes, call, timeout_s)
        await self._mesh.refresh(nodes)
        return results

    async def _request_each(self, nodes: Iterable[str], call: HttpCall, timeout_s: float) -> list[NodeResult]:
        """Sends the same request to all nodes at the same time, and returns the results in the order of ``nodes``."""
        stores = [ModelStore(node, over_mesh(self._mesh, node)) for node in nodes]
        return list(await asyncio.gather(*(store.request(call, timeout_s=timeout_s) for store in stores)))

    # -- blobs ---------------------------------------------------------------------------------------------------

    async def find_blob(self, nodes: Iterable[str], digest: str) -> BlobHolders:
        """Asks the nodes whether they have the blob."""
        holders = BlobHolders()
        for result in await self._request_each(nodes, HttpCall("HEAD", BLOBS_PATH + digest), BLOB_CHECK_TIMEOUT_S):
            if result.status == 200:
                holders.having.append(result.node)
            elif result.status == 404:
                holders.lacking.append(result.node)
            else:
                reason = f"{result.node} did not say whether it has the blob: {result.error_text}"
                holders.unsure.append(failed_result(result.node, BackendError(reason, node=result.node)))
        return holders

    async def _nodes_with_blobs(self, nodes: Collection[str], digests: Iterable[str]) -> list[str]:
        """The nodes that have all of the blobs."""
        remaining = list(nodes)
        for digest in digests:
            having = set((await self.find_blob(remaining, digest)).having)
            remaining = [node for node in remaining if node in having]
        return remaining

    async def add_blob(
        self, nodes: Sequence[str], digest: str, pieces: AsyncIterable[bytes], *, timeout_s: float
    ) -> list[NodeResult]:
        """Sends the blob, piece by piece, to ``nodes``: the nodes that lack it by ``find_blob``. Returns their results
        in the same order."""

        async def upload(node: str, body: AsyncIterable[bytes]) -> NodeResult:
            """Uploads to one node. A failure is the result of this node, and does not stop the others."""
            try:
                answer = await self._mesh.upload(node, BLOBS_PATH + digest, body, timeout_s=timeout_s)
                return answered_result(node, answer.status, await read_body(answer) or b"")
            except GPUMeshError as error:
                return failed_result(node, error)

        return await upload_to_nodes(nodes, pieces, upload)


def is_done_where_possible(results: Sequence[NodeResult]) -> bool:
    """Whether a ``copy`` or ``delete`` has succeeded on every node that has the model, and on one node at least. A node
    that answers that it does not have the model does not count: it has lost the model since the node was chosen."""
    is_done_somewhere = any(result.done for result in results)
    return is_done_somewhere and all(result.done or result.model_is_missing for result in results)
