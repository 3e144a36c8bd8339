"""``LoadOptions``: the options of a request with which Ollama loads the model. Pure.

Another value of one of them makes the server load the model again, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from gpumesh.backends import safe_json
from gpumesh.backends.model_list import MAX_CONTEXT_TOKENS
from gpumesh.balancer.base import ResidencyKey
from gpumesh.text.model_names import full_name

MAX_VALUE = 1 << 31  # of an option, such as a number of layers; no server takes more
# The options beside ``num_ctx``, in alphabetical order.
_RELOAD_OPTIONS = ("main_gpu", "num_batch", "num_gpu", "num_thread", "use_mmap")


@lru_cache(maxsize=512)  # most requests pass here
def plain_residency_key(model: str) -> ResidencyKey:
    """What the model must be loaded with for a request without options."""
    return ResidencyKey(full_name(model))


class LoadOptions(msgspec.Struct, gc=False):
    """The part of ``options`` that the mesh reads. Its values may be anything that JSON can hold.

    Ollama reads ``options`` into a map of Go. So a name counts only in exactly this spelling, and of two members with
    one name the last counts. (In the outermost object of a body, ``MODEL`` is the same as ``model``.) ``num_predict``,
    the longest answer in tokens, makes no difference for the load."""

    num_predict: Any = None
    num_ctx: Any = None
    main_gpu: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    num_thread: Any = None
    use_mmap: Any = None

    @property
    def context(self) -> int | None:
        """The context in tokens that the client asks for; ``None`` if it asks for none, or for something that cannot be
        a context."""
        if self.num_ctx is None:  # most requests
            return None
        return safe_json.as_bounded_count(self.num_ctx, MAX_CONTEXT_TOKENS) or None

    def residency_key(self, model: str) -> ResidencyKey:
        """What the model must be loaded with for a request with these options. An option that is neither a number nor a
        truth value is left out: the server refuses it."""
        reload_options = []
        for name in _RELOAD_OPTIONS:
            value = getattr(self, name)
            # A bool is an int for ``isinstance``, and None is not. The comparison is false for NaN.
            if isinstance(value, (int, float)) and abs(value) <= MAX_VALUE:
                reload_options.append((name, value))
        return ResidencyKey(full_name(model), self.context, tuple(reload_options))


def read_load_options(options: Mapping[str, Any]) -> LoadOptions:
    """The load options in the ``options`` of a request that this program makes itself: a dict, not yet written as
    JSON."""
    return msgspec.convert({key: options[key] for key in LoadOptions.__struct_fields__ if key in options}, LoadOptions)
