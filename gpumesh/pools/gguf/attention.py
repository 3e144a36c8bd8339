"""What each block of a model keeps for the tokens that it has seen: keys and values, or a recurrent state.

After llama.cpp's src/llama-hparams.cpp, src/llama-model.cpp (``create_memory``) and the files in src/models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from gpumesh.pools.gguf.metadata import Metadata

MOST = 2**24  # no dimension, and no window, of a real model is larger
F32_BYTES = 4


class WindowPattern(NamedTuple):
    """Each ``period``-th layer looks at the whole context, the others at a window: the last of each period, or the
    first (``full_first``)."""

    period: int
    full_first: bool = False


# Calls of ``load_swa_pattern`` in src/models/*.cpp. A list in the file goes before it.
WINDOW_PATTERNS = {
    "afmoe": WindowPattern(4),
    "cohere2": WindowPattern(4),
    "cohere2moe": WindowPattern(4, full_first=True),
    "exaone-moe": WindowPattern(4),
    "exaone4": WindowPattern(4),
    "gemma2": WindowPattern(2),
    "gemma3": WindowPattern(6),
    "gemma3n": WindowPattern(5),
    "gpt-oss": WindowPattern(2),
    "laguna": WindowPattern(4, full_first=True),
    "llama4": WindowPattern(4),
    "mellum": WindowPattern(4),
    "olmo2": WindowPattern(4),
    "plamo3": WindowPattern(8),
    "smallthinker": WindowPattern(4, full_first=True),
}
WINDOW_IN_ALL_LAYERS = {"lfm2", "lfm2moe"}
WINDOWS_IF_NOT_GIVEN = {"exaone4": 4096, "gemma2": 4096, "llama4": 8192}
FIXED_WINDOWS = {"llama4": 8192, "smallthinker": 4096}
# The layers of gemma3n from this one on use the keys of earlier layers.
GEMMA3N_LAYERS_WITH_KEYS = 20
EXAONE4_LAYERS_WITH_WINDOWS = 64

# The parts of tensors' names, behind ``blk.N.``, that show what a block is.
KEYS = re.compile(r"attn_(k|qkv|kv_a_mqa)\.weight")
SEPARATE_KEYS = re.compile(r"attn_k\.weight")
RECURRENT = re.compile(r"(ssm_|shortconv\.|time_mix_)")
# Caches whose size is not known here: indexers of sparse attention, and linear attention of other forms.
UNKNOWN_CACHE = re.compile(r"(indexer[._]|ssm_(f_a|f_b|g_a|g_b|g|conv1d_q)\.|attn_compressor_|hc_)")
UNKNOWN_ARCHITECTURES = {"minimax-01"}


@dataclass(frozen=True, slots=True)
class Caches:
    """``elements``: the keys and values that one token adds, by block; ``state_bytes``: by block, for one stream.
    ``head_size`` and ``kv_heads`` are the largest of all blocks. ``problem``: why the size cannot be computed."""

    elements: tuple[int, ...]
    state_bytes: tuple[int, ...]
    window: int | None
    window_layers: tuple[bool, ...]
    head_size: int
    kv_heads: int
    problem: str | None = None


class _HeadSize(NamedTuple):
    keys: int
    values: int


def find_caches(metadata: Metadata, architecture: str, layers: int, parts: Mapping[int, Set[str]]) -> Caches:
    """``parts`` has the names of each block's tensors, without ``blk.N.``. Raises GgufError if the header contradicts
    itself."""
    # The last blocks of some models only propose tokens: they have weights, and are not used here.
    drafting = metadata.count(f"{architecture}.nextn_predict_layers", most=layers) or 0
    used = layers - drafting
    window, window_layers = _find_windows(metadata, architecture, used)
    window_layers += (False,) * (layers - len(window_layers))
    heads = metadata.counts(f"{architecture}.attention.head_count", layers, most=MOST) or (0,) * layers
    kv_heads = metadata.counts(f"{architecture}.attention.head_count_kv", layers, most=MOST) or heads
    full = _head_size(
        metadata, architecture, "", _divide(metadata.count(f"{architecture}.embedding_length", most=MOST), heads[0])
    )
    windowed = _head_size(metadata, architecture, "_swa", full)
    latent = bool(metadata.count(f"{architecture}.attention.key_length_mla", most=MOST))
    with_keys = min(used, _layers_with_keys(metadata, architecture, layers))
    state = _state_bytes(metadata, architecture)
    elements = [0] * layers
    states = [0] * layers
    for layer in range(used):
        names = parts.get(layer, set())
        recurrent = _any(RECURRENT, names)
        attends = _any(SEPARATE_KEYS if recurrent else KEYS, names)
        size = windowed if window_layers[layer] else full
        if attends and layer < with_keys:
            elements[layer] = kv_heads[layer] * (size.keys if latent else size.keys + size.values)
        if recurrent:
            states[layer] = state
    names = set().union(*parts.values()) if parts else set()
    return Caches(
        elements=tuple(elements),
        state_bytes=tuple(states) if any(states) else (),
        window=window,
        window_layers=window_layers if window else (),
        head_size=max(full.keys, windowed.keys if window else 0),
        kv_heads=max(kv_heads),
        problem=_find_problem(architecture, names, elements, states),
    )


def _find_problem(architecture: str, names: Set[str], elements: Sequence[int], states: Sequence[int]) -> str | None:
    recurrent_without_state = _any(RECURRENT, names) and not any(states)
    if architecture in UNKNOWN_ARCHITECTURES or _any(UNKNOWN_CACHE, names) or recurrent_without_state:
        return f"gpumesh does not know how much memory the cache of the architecture {architecture} needs"
    if not any(elements) and not any(states):
        return f"the architecture {architecture} has no cache that gpumesh knows; is it a model that writes text?"
    return None


def _find_windows(metadata: Metadata, architecture: str, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The tokens of the window, and for each layer whether it has one."""
    key = f"{architecture}.attention.sliding_window"
    window = _window_tokens(architecture, metadata.count(key, most=2**31), layers)
    listed = metadata.values.get(f"{key}_pattern")
    pattern = WINDOW_PATTERNS.get(architecture)
    if not window:
        return None, ()
    if isinstance(listed, tuple) and len(listed) >= layers:
        return window, tuple(bool(value) for value in listed[:layers])
    if architecture in WINDOW_IN_ALL_LAYERS:
        return window, (True,) * layers
    if pattern is None:
        return None, ()  # llama.cpp does not look at the key for other architectures
    period = listed if isinstance(listed, int) and listed > 0 else pattern.period
    full_at = 0 if pattern.full_first else period - 1
    return window, tuple(layer % period != full_at for layer in range(layers))


def _window_tokens(architecture: str, given: int | None, layers: int) -> int | None:
    if given == 0 or (architecture == "exaone4" and layers != EXAONE4_LAYERS_WITH_WINDOWS):
        return None
    if given is None:
        return WINDOWS_IF_NOT_GIVEN.get(architecture)
    return FIXED_WINDOWS.get(architecture, given)


def _head_size(metadata: Metadata, architecture: str, suffix: str, default: _HeadSize) -> _HeadSize:
    keys = metadata.count(f"{architecture}.attention.key_length{suffix}", most=MOST)
    values = metadata.count(f"{architecture}.attention.value_length{suffix}", most=MOST)
    return _HeadSize(default.keys if keys is None else keys, default.values if values is None else values)


def _divide(embedding: int | None, heads: int) -> _HeadSize:
    size = (embedding or 0) // heads if heads else 0
    return _HeadSize(size, size)


def _layers_with_keys(metadata: Metadata, architecture: str, layers: int) -> int:
    """The first so many layers have keys of their own, the others use those of earlier ones."""
    if architecture == "gemma3n":
        return GEMMA3N_LAYERS_WITH_KEYS
    return layers - (metadata.count(f"{architecture}.attention.shared_kv_layers", most=layers) or 0)


def _state_bytes(metadata: Metadata, architecture: str) -> int:
    """Of one recurrent block, for one stream (``n_embd_r`` and ``n_embd_s`` of src/llama-hparams.cpp, as F32)."""

    def number(key: str) -> int:
        return metadata.count(f"{architecture}.{key}", most=MOST) or 0

    embedding = number("embedding_length")
    if head_size := number("wkv.head_size"):
        shifts = metadata.count(f"{architecture}.token_shift_count", most=MOST)
        return F32_BYTES * embedding * ((2 if shifts is None else shifts) + head_size)
    if short_cache := number("shortconv.l_cache"):
        return F32_BYTES * embedding * (short_cache - 1)
    inner, state = number("ssm.inner_size"), number("ssm.state_size")
    convolution = max(number("ssm.conv_kernel") - 1, 0) * (inner + 2 * number("ssm.group_count") * state)
    return F32_BYTES * (convolution + state * inner)


def _any(pattern: re.Pattern[str], names: Set[str]) -> bool:
    return any(pattern.match(name) for name in names)
