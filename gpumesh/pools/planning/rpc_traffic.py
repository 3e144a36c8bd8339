"""What llama.cpp's RPC sends to a worker and waits for: in each decoded step, when a graph is built anew, and at the
load of a model. docs/internals/pools.md says where in llama.cpp's source each figure is from (protocols 4 to 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpumesh.pools.base import ModelShape

# Sizes in bytes, of the packed structures in ggml/src/ggml-rpc/ggml-rpc.cpp.
COMMAND_BYTES = 1 + 8  # the command, and the length of what follows
TENSOR_BYTES = 296  # rpc_tensor: a tensor's type, shape, operation, sources and name
SET_TENSOR_BYTES = COMMAND_BYTES + TENSOR_BYTES + 8  # before the data
GET_TENSOR_BYTES = COMMAND_BYTES + TENSOR_BYTES + 16
RECOMPUTE_BYTES = COMMAND_BYTES + 4
ANSWER_BYTES = 8  # the length before an answer

# The part of the context that a graph covers grows in steps of so many tokens (llama_kv_cache::get_n_kv). Each of these
# steps needs a new graph.
GRAPH_TOKENS = 256
# The tensors that the graph of one layer consists of, its weights among them (a llama; others have a few more).
GRAPH_TENSORS_PER_LAYER = 50
# A new graph asks the worker for the memory of each attention, and of each product with experts (GET_ALLOC_SIZE): once
# as a result, and once as a source of the next tensor.
GRAPH_WAITS_PER_LAYER = 2
GRAPH_WAITS_PER_EXPERT_LAYER = 2 + 3 * 2

# A prompt is read in pieces of so many tokens (llama-server's --ubatch-size).
PROMPT_TOKENS = 512
# A start waits for so many answers of a worker: its devices and buffers; for each layer, the memory of its attention in
# the several graphs that are tried, and its large weights, each of which the worker may have in its cache.
LOAD_WAITS = 20
LOAD_WAITS_PER_LAYER = 7 + 16


@dataclass(frozen=True, slots=True)
class WorkerTraffic:
    """What goes between the head and one worker. ``waits``: answers for which the head waits, one after the other."""

    waits: float
    sent_bytes: float
    received_bytes: float

    def __add__(self, other: WorkerTraffic) -> WorkerTraffic:
        return WorkerTraffic(
            self.waits + other.waits,
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
        )

    def scale(self, factor: float) -> WorkerTraffic:
        return WorkerTraffic(self.waits * factor, self.sent_bytes * factor, self.received_bytes * factor)


def estimate_step(shape: ModelShape, *, tokens: int, filled: float, has_output: bool) -> WorkerTraffic:
    """The traffic of one decoded step of ``tokens`` tokens (of all streams together).

    ``filled``: tokens in the longest stream's context. ``has_output``: the worker computes the output too, so that the
    probabilities of the whole vocabulary cross the network for each token, instead of the hidden state.
    """
    covered = -(-max(filled, 1) // GRAPH_TOKENS) * GRAPH_TOKENS
    hidden = 4 * shape.embedding * tokens
    mask = 2 * covered * tokens  # 16-bit numbers, with flash attention
    positions = (4 + 8 + 8) * tokens  # of the tokens, and where their keys and values go in the cache
    inputs = 5 + (1 if has_output else 0)
    sent = inputs * SET_TENSOR_BYTES + hidden + mask + positions + RECOMPUTE_BYTES + GET_TENSOR_BYTES
    received = ANSWER_BYTES + (4 * shape.vocabulary * tokens if has_output else hidden)
    return WorkerTraffic(1, sent, received)


def estimate_new_graph(shape: ModelShape, layers: int) -> WorkerTraffic:
    """The traffic when the graph of so many layers is built anew: its description goes to the worker once."""
    waits = layers * (GRAPH_WAITS_PER_EXPERT_LAYER if shape.experts else GRAPH_WAITS_PER_LAYER)
    request_bytes = COMMAND_BYTES + 4 + 11 * TENSOR_BYTES  # the tensor and its ten sources
    described = layers * GRAPH_TENSORS_PER_LAYER * (TENSOR_BYTES + 8)
    return WorkerTraffic(waits, waits * request_bytes + described, waits * (ANSWER_BYTES + 8))


def estimate_prompt(shape: ModelShape, *, tokens: int, layers: int, has_output: bool) -> WorkerTraffic:
    """The traffic until the first token of a prompt of ``tokens`` tokens, for a worker with so many layers."""
    steps = max(1, math.ceil(tokens / PROMPT_TOKENS))
    traffic = estimate_new_graph(shape, layers).scale(min(steps, 2))  # the last piece is shorter than the others
    done = 0
    while done < tokens:
        piece = min(PROMPT_TOKENS, tokens - done)
        done += piece
        step = estimate_step(shape, tokens=piece, filled=done, has_output=False)
        traffic = traffic + step
    if has_output:  # only for the last token
        traffic = traffic + WorkerTraffic(0, SET_TENSOR_BYTES, 4 * shape.vocabulary)
    return traffic


def estimate_load(layers: int, *, weights_bytes: int, is_cached: bool) -> WorkerTraffic:
    """The traffic when a worker gets so many layers, until the head answers."""
    waits = LOAD_WAITS + LOAD_WAITS_PER_LAYER * layers
    return WorkerTraffic(waits, 0 if is_cached else weights_bytes, 0)
