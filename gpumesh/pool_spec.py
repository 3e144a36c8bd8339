"""What mesh.yaml says of pools: one model over the GPUs of several nodes, by llama.cpp's RPC. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

NGRAM_DRAFT = "ngram"
"""Takes the place of a draft model: llama-server proposes what followed the same tokens before."""


class KvType(StrEnum):
    """The type of the numbers in a pool's KV cache, as llama.cpp names it. Fewer bits need less memory."""

    F16 = "f16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


@dataclass(frozen=True, slots=True)
class PoolMember:
    """A node of a pool. ``memory_mib``: the pool takes at most so much of the node's memory; ``None``: what is free on
    its GPUs. A node without a GPU that nvidia-smi knows computes on its CPU, and only with ``memory_mib``."""

    node: str
    memory_mib: int | None = None


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One pool.

    - ``model``: the path of a GGUF file on the head's host (absolute, or with ~), or the name of a model that the
      Ollama on the head's host has. Clients ask for it by ``served_name``.
    - ``members`` hold layers of the model. ``head``, one of their nodes, runs llama-server.
    - ``context``: in tokens, for each of the ``parallel`` streams that are decoded together.
    - ``split``: the number of layers for each of ``members``, in their order; ``None``: as planned.
    - ``draft``: a small model of the same kind on the head, in the same form as ``model``, that proposes tokens; or
      ``NGRAM_DRAFT``.
    - ``llama_cpp_dir``: the folder with llama.cpp's programs on the hosts; ``None``: they are looked for.
    - ``unload``: the Ollama of a member may be asked to unload its models when the pool needs their memory.
    - ``autostart``: the pool starts with the mesh.
    """

    name: str
    model: str
    members: tuple[PoolMember, ...]
    head: str
    context: int = 4096
    parallel: int = 1
    split: tuple[int, ...] | None = None
    draft: str | None = None
    kv_type: KvType = KvType.F16
    llama_cpp_dir: str | None = None
    unload: bool = False
    autostart: bool = False

    @property
    def draft_model(self) -> str | None:
        """The draft model; ``None``: there is none."""
        return None if self.draft == NGRAM_DRAFT else self.draft

    @property
    def is_file(self) -> bool:
        """Whether ``model`` is the path of a file on the head's host."""
        return is_model_path(self.model)

    @property
    def served_name(self) -> str:
        """The name by which clients ask for the model: the Ollama model's, or the file's without its folder and
        ending."""
        if not self.is_file:
            return self.model
        return self.model.rsplit("/", 1)[-1].removesuffix(".gguf")


def is_model_path(model: str) -> bool:
    """Whether ``model`` of a pool is a file's path, not the name of an Ollama model."""
    if model.startswith(("/", "~/")):
        return True
    return (
        model.endswith(".gguf") and ":" not in model
    )  # Ollama takes a file's name as the tag of a model of Hugging Face
