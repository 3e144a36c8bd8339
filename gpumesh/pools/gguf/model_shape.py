"""What the keys and tensors of a GGUF header say together (llama.cpp's src/llama-model.cpp, ``load_tensors``)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpumesh.pools.base import ModelShape
from gpumesh.pools.gguf.attention import MOST, Caches, find_caches
from gpumesh.pools.gguf.errors import GgufError
from gpumesh.pools.gguf.ggml_types import FILE_TYPES
from gpumesh.pools.gguf.metadata import Metadata
from gpumesh.pools.gguf.tensors import Tensor
from gpumesh.text.printable import printable

MOST_LAYERS = 1024
# Names of architectures that Ollama writes and llama.cpp does not know (src/llama-arch.cpp).
ONLY_IN_OLLAMA = {"gptoss", "mllama"}
ARCHITECTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
BLOCK = re.compile(r"blk\.(\d{1,4})\.(.+)", re.DOTALL)
# Tensors that are needed before the first block (LLM_TENSOR_LAYER_INPUT in src/llama-arch.cpp).
INPUTS = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.", "masked_embd_")
# Tensors without a block's number that llama.cpp puts with the first block.
FIRST_BLOCK = ("rope_freqs.", "rope_factors_", "per_layer_model_proj.", "per_layer_proj_norm.", "token_embd_norm.")
# Parts of a model that looks at pictures or hears. llama.cpp wants them in a file of their own.
OTHER_SENSES = ("v.", "mm.", "a.", "s.")


def shape_of(metadata: Metadata, tensors: Sequence[Tensor], file_bytes: int) -> ModelShape:
    """Raises GgufError if the header is not that of a language model, or contradicts itself."""
    architecture = metadata.text("general.architecture") or ""
    if not ARCHITECTURE.fullmatch(architecture):
        raise GgufError("it does not say its architecture (general.architecture)")
    layers = metadata.count(f"{architecture}.block_count", most=MOST_LAYERS)
    embedding = metadata.count(f"{architecture}.embedding_length", most=MOST)
    if not layers or not embedding:
        raise GgufError("it does not say its size (block_count, embedding_length): is it a language model?")
    widest = _WidestLayer(metadata, architecture, layers)
    places = _place_tensors(tensors, layers)
    caches = find_caches(metadata, architecture, layers, places.part_names)
    experts = widest.number("expert_count")
    name = metadata.text("general.name")
    file_type = metadata.count("general.file_type", most=2**31)
    return ModelShape(
        architecture=architecture,
        name=printable(name) if name else None,
        file_type=None if file_type is None else FILE_TYPES.get(file_type),
        layer_bytes=places.layer_bytes,
        input_bytes=places.input_bytes,
        output_bytes=places.output_bytes,
        kv_elements=caches.elements,
        embedding=embedding,
        vocabulary=places.vocabulary or metadata.lengths.get("tokenizer.ggml.tokens", 0),
        heads=widest.number("attention.head_count"),
        trained_context=metadata.count(f"{architecture}.context_length", most=2**31),
        parameters=sum(tensor.elements for tensor in tensors),
        file_bytes=file_bytes,
        tied_output=places.tied_output,
        window=caches.window,
        window_layers=caches.window_layers,
        state_bytes=caches.state_bytes,
        head_size=caches.head_size,
        kv_heads=caches.kv_heads,
        feed_forward=(widest.number("expert_feed_forward_length") if experts else 0)
        or widest.number("feed_forward_length"),
        experts=experts,
        experts_used=widest.number("expert_used_count") if experts else 0,
        query_norm=any("attn_q_norm.weight" in names for names in places.part_names.values()),
        learned_positions=any(tensor.name.startswith("position_embd.") for tensor in tensors),
        obstacles=tuple(_find_obstacles(architecture, places, caches)),
    )


def _find_obstacles(architecture: str, places: _Places, caches: Caches) -> Iterator[str]:
    if architecture in ONLY_IN_OLLAMA:
        yield f"the file has Ollama's own form ({architecture}), which llama-server does not load; take a GGUF file"
        return
    yield from places.problems
    if caches.problem:
        yield caches.problem


@dataclass(frozen=True, slots=True)
class _WidestLayer:
    """Numbers that a header gives for all layers or for each."""

    metadata: Metadata
    architecture: str
    layers: int

    def number(self, key: str) -> int:
        """The largest of all layers; 0 if the header does not have it."""
        return max(self.metadata.counts(f"{self.architecture}.{key}", self.layers, most=MOST) or (0,))


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the tensors belong. ``part_names`` has, by block, the names of its tensors without ``blk.N.``."""

    layer_bytes: tuple[int, ...]
    input_bytes: int
    output_bytes: int
    vocabulary: int | None
    tied_output: bool
    part_names: Mapping[int, frozenset[str]]
    problems: tuple[str, ...]


def _place_tensors(tensors: Sequence[Tensor], layers: int) -> _Places:
    """llama.cpp keeps the inputs on the CPU, a block's tensors on the device of the block, and the others on the device
    of the output."""
    layer_bytes = [0] * layers
    part_names: dict[int, set[str]] = {}
    input_bytes = output_bytes = embedding_bytes = 0
    vocabulary = None
    has_output = other_senses = False
    for tensor in tensors:
        match = BLOCK.fullmatch(tensor.name)
        if match:
            block = int(match[1])
            if block >= layers:
                raise GgufError(f"its tensor {tensor.name!r} belongs to a block that it does not have")
            layer_bytes[block] += tensor.bytes
            part_names.setdefault(block, set()).add(match[2])
        elif tensor.name.startswith(INPUTS):
            input_bytes += tensor.bytes
        elif tensor.name.startswith(FIRST_BLOCK):
            layer_bytes[0] += tensor.bytes
        elif tensor.name.startswith(OTHER_SENSES):
            other_senses = True
        else:
            output_bytes += tensor.bytes
        if tensor.name == "token_embd.weight":
            embedding_bytes = tensor.bytes
            vocabulary = tensor.dimensions[1] if len(tensor.dimensions) > 1 else None
        has_output = has_output or tensor.name == "output.weight"
    problems = []
    if other_senses:
        problems.append(
            "the file also holds what the model sees or hears with, and llama.cpp wants that in a file apart"
        )
    if not embedding_bytes:
        problems.append("the file has no token embeddings: is it a part of a model, or no language model?")
    return _Places(
        tuple(layer_bytes),
        input_bytes,
        output_bytes + (0 if has_output else embedding_bytes),
        vocabulary,
        not has_output,
        {block: frozenset(names) for block, names in part_names.items()},
        tuple(problems),
    )
