"""What requests return: ``Completion``, ``ReplyChunk``, ``Embeddings``, ``FleetModel`` and ``BatchResult``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpumesh.errors import GPUMeshError
from gpumesh.library.messages import Message, ToolCall
from gpumesh.state import MeshState


@dataclass(frozen=True, slots=True)
class ReplyChunk:
    """A piece of an answer as it comes. ``str(chunk)`` is its text."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer. ``str(completion)`` is its text.

    ``node`` has answered, at the request's attempt number ``attempts``, after ``queue_ms`` in the queue. ``tokens``,
    ``prompt_tokens``, ``tokens_per_s`` and ``load_ms`` are the server's own figures; ``ttft_ms`` (to the first token,
    only if the answer was streamed) and ``total_ms`` are measured here. ``None``: not known.
    """

    text: str
    model: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    node: str | None = None
    attempts: int = 1
    queue_ms: float = 0.0
    tokens: int | None = None
    prompt_tokens: int | None = None
    tokens_per_s: float | None = None
    load_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float = 0.0
    done_reason: str | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def message(self) -> Message:
        """The answer as a message, for the next turn of the chat."""
        return Message("assistant", self.text, tool_calls=self.tool_calls, thinking=self.thinking or None)

    def json(self) -> Any:
        """The text, read as JSON (``format=``). Raises ValueError if it is none: for example, it may be cut because
        ``num_predict`` was too small."""
        try:
            return json.loads(self.text)
        except ValueError as error:
            raise ValueError(f"the answer is no JSON (it ended by {self.done_reason!r}): {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Vectors, one for each text, in the order of the texts. Also a sequence of them."""

    vectors: tuple[tuple[float, ...], ...]
    model: str
    node: str | None = None
    attempts: int = 1
    prompt_tokens: int | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def __iter__(self) -> Iterator[tuple[float, ...]]:
        return iter(self.vectors)

    def __getitem__(self, index: int) -> tuple[float, ...]:
        return self.vectors[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetModel:
    """A model of the fleet. ``nodes`` have it and are up; on those of ``loaded_on`` it is in memory."""

    name: str
    nodes: tuple[str, ...]
    loaded_on: tuple[str, ...] = ()
    size_mib: int | None = None
    parameter_size: str | None = None
    quantization: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """The result of one prompt of ``run_many``: a ``completion``, or the ``error``. ``index`` counts from 0."""

    index: int
    prompt: Any
    completion: Completion | None = None
    error: GPUMeshError | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def text(self) -> str:
        """The answer's text. Raises the prompt's error if it has failed."""
        return self.result().text

    def result(self) -> Completion:
        """The answer. Raises the prompt's error if it has failed."""
        if self.completion is None:
            assert self.error is not None, "a result has a completion or an error"
            raise self.error
        return self.completion


def list_models(state: MeshState) -> tuple[FleetModel, ...]:
    """The models of all nodes that are up, by name."""
    up = [node for node in state.nodes if node.health.is_serving]
    names = sorted({name for node in up for name in node.backend.models})
    models = []
    for name in names:
        infos = [info for node in up for info in node.backend.catalog if info.name == name]
        info = infos[0] if infos else None
        models.append(
            FleetModel(
                name=name,
                nodes=tuple(node.name for node in up if name in node.backend.models),
                loaded_on=tuple(node.name for node in up if any(loaded.name == name for loaded in node.backend.loaded)),
                size_mib=info.size_mib if info else None,
                parameter_size=info.parameter_size if info else None,
                quantization=info.quantization if info else None,
            )
        )
    return tuple(models)
