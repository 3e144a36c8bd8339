"""The meaning of a server's error response, read from its status and message: busy, proxy, cannot load, no such model.

The message is the text that ``error_text`` finds. It comes from a host, so it may be anything; nothing here raises.
"""

from __future__ import annotations

import re
from functools import lru_cache

from gpumesh.text.model_names import spelling_pattern

READ_CHARS = 2000  # only so much of a message is searched

_BUSY_STATUSES = frozenset({429, 529})  # 529: Anthropic's "overloaded"
# 520 to 530 are Cloudflare's; 598 and 599 are time-outs of other proxies.
_PROXY_STATUSES = frozenset({502, 504, *range(520, 529), 530, 598, 599})
NOT_SUPPORTED_STATUS = 501
TOO_LARGE_STATUS = 507  # mlx-knife and others answer so for a model that needs more memory than there is

# Parts of messages about a model that cannot be loaded, in lower case.
_LOAD_FAILURES = (
    # Ollama. "llama runner process has terminated" is the older text, "llama-server process" the newer one.
    "requires more system memory",  # "model requires more system memory (7.5 GiB) than is available (5.2 GiB)"
    "unable to load model",
    "error loading model",
    "failed to load model",
    "model failed to load",
    "llama runner process has terminated",
    "llama runner process no longer running",
    "llama-server process has terminated",
    "llama-server process no longer running",
    "timed out waiting for llama runner to start",
    "timed out waiting for llama-server to start",
    "may be incompatible with your version of ollama",
    # The memory of a GPU or of the host, as Ollama itself recognises it (llm/status.go).
    "out of memory",
    "out-of-memory",
    "out of device memory",
    "cudamalloc failed",
    "hipmalloc failed",
    "failed to allocate",
    "not enough memory",
    "insufficient memory",
    "erroroutofmemory",
    # MLX servers and LM Studio.
    "model load failed",
    "error loading the model",
)
_LOAD_FAILURE_PATTERN = re.compile(
    # Ollama with MLX: "model requires 20 GiB but only 14 GiB are available (after 1 GiB overhead)".
    r"model requires .{1,40} but only .{1,40} (?:is|are) available"
    # llama-server as a router: "model name=NAME failed to load".
    r"|model name=.{1,200} failed to load"
)


def is_busy_status(status: int) -> bool:
    """Whether the server is well, but has too much to do."""
    return status in _BUSY_STATUSES


def is_proxy_status(status: int) -> bool:
    """Whether a proxy sends this status because the server behind it does not answer."""
    return status in _PROXY_STATUSES


def is_load_failure(status: int, message: str) -> bool:
    """Whether the server says that it cannot load the model, or that the model does not fit into its memory.

    A message about a runner that stopped in its work ("model runner has unexpectedly stopped") does not say this. A
    status below 500 is an answer about the request, whatever its message says."""
    if status < 500 or is_proxy_status(status):
        return False
    text = message[:READ_CHARS].lower()
    has_text = any(part in text for part in _LOAD_FAILURES)
    return has_text or status == TOO_LARGE_STATUS or _LOAD_FAILURE_PATTERN.search(text) is not None


def says_model_is_missing(status: int, message: str, model: str) -> bool:
    """Whether the server says that it does not have this model: ``model 'x' not found``, ``The model `x` does not
    exist`` … ``model`` is its full name.

    A 404 that does not name the model may be about the path: then the server does not know this route, and the model
    may be there."""
    if status != 404:
        return False
    text = message[:READ_CHARS].lower()
    return "model" in text and _name_pattern(model).search(text) is not None


@lru_cache(maxsize=64)
def _name_pattern(model: str) -> re.Pattern[str]:
    """A pattern that finds the model's name in a message, but not as a part of a longer name. The message may leave out
    the tag ``latest`` or name Ollama's registry, because it repeats the name as the client wrote it."""
    return re.compile(rf"(?<![\w.:/-]){spelling_pattern(model)}(?![\w/-]|:\w)", re.IGNORECASE)
