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
GRAPH_TENSORS_PER_LAYER = 75
# Up to this version of the protocol, a new graph asks the worker for the memory of each attention, and of each product
# with experts (GET_ALLOC_SIZE): as a result, as a source of the next tensor, and when it gets its place. Later versions
# remember the answers.
LAST_FORGETFUL_PROTOCOL = 6
WAITS_PER_OPERATION = 3
EXPERT_OPERATIONS = 3  # in a layer with experts

# A prompt is read in pieces of so many tokens (llama-server's --ubatch-size).
PROMPT_TOKENS = 512
# A start waits for so many answers of a worker: on its devices and buffers, and on the memory of the operations above,
# in each graph that is tried.
LOAD_WAITS = 24
LOAD_WAITS_PER_OPERATION = 15
# A worker is asked whether it has a tensor above this size in its cache (HASH_THRESHOLD). A layer has so many of them.
HASHED_BYTES = 10 << 20
LARGE_TENSORS_PER_LAYER = 7


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

    ``filled``: tokens in the contexts of all streams together (the streams share one KV cache: ``--kv-unified``).
    ``has_output``: the worker computes the output too, so that the probabilities of the whole vocabulary cross the
    network for each token, instead of the hidden state.
    """
    covered = math.ceil(max(filled, 1) / GRAPH_TOKENS) * GRAPH_TOKENS
    hidden = 4 * shape.embedding * tokens
    mask = 2 * covered * tokens  # 16-bit numbers, with flash attention
    positions = (4 + 8 + 8) * tokens  # of the tokens, and where their keys and values go in the cache
    inputs = 5 + (1 if has_output else 0)
    sent = inputs * SET_TENSOR_BYTES + hidden + mask + positions + RECOMPUTE_BYTES + GET_TENSOR_BYTES
    received = ANSWER_BYTES + (4 * shape.vocabulary * tokens if has_output else hidden)
    return WorkerTraffic(1, sent, received)


def estimate_new_graph(shape: ModelShape, layers: int, *, protocol: int | None) -> WorkerTraffic:
    """The traffic when the graph of so many layers is built anew: its description goes to the worker once.

    ``protocol``: the major version of RPC's protocol; ``None``: unknown, so the slower one.
    """
    waits = _count_operations(shape, layers, protocol) * WAITS_PER_OPERATION
    request_bytes = COMMAND_BYTES + 4 + 11 * TENSOR_BYTES  # the tensor and its ten sources
    described = layers * GRAPH_TENSORS_PER_LAYER * (TENSOR_BYTES + 8)
    return WorkerTraffic(waits, waits * request_bytes + described, waits * (ANSWER_BYTES + 8))


def _count_operations(shape: ModelShape, layers: int, protocol: int | None) -> int:
    """The operations for whose memory the worker is asked each time."""
    if protocol is not None and protocol > LAST_FORGETFUL_PROTOCOL:
        return 0
    return layers * (1 + (EXPERT_OPERATIONS if shape.experts else 0))


def estimate_prompt(
    shape: ModelShape, *, tokens: int, layers: int, has_output: bool, protocol: int | None
) -> WorkerTraffic:
    """The traffic until the first token of a prompt of ``tokens`` tokens, for a worker with so many layers."""
    pieces = math.ceil(tokens / PROMPT_TOKENS)  # each looks back on more tokens than the one before: a new graph
    traffic = estimate_new_graph(shape, layers, protocol=protocol).scale(pieces)
    done = 0
    while done < tokens:
        piece = min(PROMPT_TOKENS, tokens - done)
        done += piece
        step = estimate_step(shape, tokens=piece, filled=done, has_output=False)
        traffic = traffic + step
    if has_output:  # only for the last token
        traffic = traffic + WorkerTraffic(0, SET_TENSOR_BYTES, 4 * shape.vocabulary)
    return traffic


def estimate_load(
    shape: ModelShape, *, layers: int, weights_bytes: int, is_cached: bool, protocol: int | None
) -> WorkerTraffic:
    """The traffic when a worker gets so many layers (without the output), until the head answers."""
    operations = _count_operations(shape, layers, protocol)
    has_large_tensors = weights_bytes > HASHED_BYTES * LARGE_TENSORS_PER_LAYER * layers
    hashed = LARGE_TENSORS_PER_LAYER * layers if has_large_tensors else 0
    waits = LOAD_WAITS + LOAD_WAITS_PER_OPERATION * operations + hashed
    return WorkerTraffic(waits, 0 if is_cached else weights_bytes, 0)
