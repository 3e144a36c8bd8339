"""A small language model of random weights, for a real inference server: ready in a tenth of a second, 0.4 MB.

Its text is gibberish; queueing, streaming, time-outs, cancelling and counters are real. The vocabulary is bytes (what
SentencePiece falls back to), so that every prompt can be read. Only letters, digits and the blank are ever answered:
the rows of the output for all other tokens are zero, among them the end of the text, so that an answer ends at the
number of tokens that was asked for.
"""

from __future__ import annotations

import itertools
import string
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, TokenType

CONTEXT = 4096
EPSILON = 1e-5
UNKNOWN, BEGIN, END = 0, 1, 2
FIRST_BYTE = 3
VOCABULARY = FIRST_BYTE + 256
ANSWERED = (string.ascii_lowercase + string.digits + " ").encode()


def write_tiny_model(
    path: Path,
    *,
    layers: int = 4,
    dim: int = 64,
    heads: int = 4,
    feed_forward: int | None = None,
    seed: int = 7,
    overlapping: bool = False,
) -> Path:
    """Writes a llama as GGUF, its weights in 32-bit floats. ``layers`` 16 and ``dim`` 512 are slow (150 tokens/s).

    ``feed_forward`` is twice ``dim`` if it is not given. ``overlapping``: all weights are parts of one array, each
    begins one number behind the one before. This takes neither time nor memory, and no two tensors are equal.
    """
    feed_forward = feed_forward or 2 * dim
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_dimension_count(dim // heads)
    writer.add_vocab_size(VOCABULARY)
    _add_vocabulary(writer)
    random = np.random.default_rng(seed)
    spread = np.float32(dim**-0.5)
    shared = random.standard_normal(feed_forward * dim + 9 * layers, dtype=np.float32) * spread if overlapping else None
    begin = itertools.count()

    def weights(rows: int, columns: int) -> npt.NDArray[np.float32]:
        if shared is None:
            return random.standard_normal((rows, columns), dtype=np.float32) * spread
        first = next(begin)
        return shared[first : first + rows * columns].reshape(rows, columns)

    ones = np.ones(dim, dtype=np.float32)
    output = weights(VOCABULARY, dim) * np.float32(4.0)
    answered = [FIRST_BYTE + byte for byte in ANSWERED]
    output[[token for token in range(VOCABULARY) if token not in answered]] = 0.0
    writer.add_tensor("token_embd.weight", weights(VOCABULARY, dim))
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", output)
    for layer in range(layers):
        block = f"blk.{layer}"
        writer.add_tensor(f"{block}.attn_norm.weight", ones)
        writer.add_tensor(f"{block}.ffn_norm.weight", ones)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"{block}.{name}.weight", weights(dim, dim))
        writer.add_tensor(f"{block}.ffn_gate.weight", weights(feed_forward, dim))
        writer.add_tensor(f"{block}.ffn_up.weight", weights(feed_forward, dim))
        writer.add_tensor(f"{block}.ffn_down.weight", weights(dim, feed_forward))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: GGUFWriter) -> None:
    """As SentencePiece writes it: three of its own, then the bytes by value."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256])
    writer.add_unk_token_id(UNKNOWN)
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
