"""``HeadLog``: what llama-server says in its log of its devices, its memory, its progress and its failure.

The lines of llama.cpp build 10434 with ``-lv 4``; older builds write the same with other prefixes. What comes from a
host is hostile: numbers are bounded, texts are safe to print.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum

from gpumesh.errors import PoolError
from gpumesh.pools.hosts.buffer_places import BufferPlace, read_place
from gpumesh.pools.hosts.head_errors import find_effect, find_error
from gpumesh.text.printable import printable

MAX_LINE_LENGTH = 2000
MAX_NAMES = 256  # of devices, and of buffers; later ones are not noted
# The time and the level before a line: ``0.00.012.991 I ``.
_PREFIX = re.compile(r"(?:[0-9]+(?:\.[0-9]+){3} )?(?:(?P<level>[EWID]) )?")
_BUFFER = re.compile(
    r"(?P<name>[A-Za-z][\w.:\[\]-]{0,79}) +(?P<kind>model|KV|RS|compute|output) buffer size"
    r" = +(?P<mib>[0-9]{1,9}\.[0-9]{1,4}) MiB"
)
_DEVICE = re.compile(
    r"using device (?P<name>[\w.:-]{1,32}) \((?P<description>.{0,200}?)\) (?:\(.*\) )?- [0-9]{1,9} MiB free"
)
_ACCEPTANCE = re.compile(
    r"draft acceptance.*?\( *(?P<accepted>[0-9]{1,9}) accepted / *(?P<proposed>[0-9]{1,9}) generated\)"
)


class BufferKind(StrEnum):
    MODEL = "model"  # weights
    KV = "KV"
    STATE = "RS"  # the state of recurrent layers
    COMPUTE = "compute"
    OUTPUT = "output"  # on the head's CPU


class HeadLog:
    """Takes the lines of llama-server's output one by one. ``nodes_by_endpoint`` has the node of each worker.

    - ``devices``: those that get layers: their names, with the endpoint of a worker's device, or the GPU's name.
    - ``is_loading``, ``is_ready``: the model's weights are being loaded; llama-server has loaded all.
    - ``loaded_share``: the part of the weights that is loaded, from 0 to 1; ``None``: unknown.
    - ``error``: the first failure that it names, in clear words. ``effect``: a failure that another may have caused,
      whose line may come later; it is the reason if llama-server ends without an ``error``.
    - ``draft_proposed``, ``draft_accepted``: the tokens of the draft model so far.
    """

    def __init__(self, nodes_by_endpoint: Mapping[str, str]) -> None:
        self._nodes = nodes_by_endpoint
        self._buffers: dict[tuple[bool, BufferPlace, BufferKind], int] = {}
        self._is_draft = False
        self._dots = 0
        self.devices: dict[str, str] = {}
        self.is_loading = False
        self.is_ready = False
        self.error: PoolError | None = None
        self.effect: PoolError | None = None
        self.last_error_line: str | None = None
        self.draft_proposed = 0
        self.draft_accepted = 0

    def __repr__(self) -> str:
        state = "FAILED" if self.error else "READY" if self.is_ready else "LOADING" if self.is_loading else "STARTING"
        return f"<HeadLog {state} {len(self.devices)} devices {len(self._buffers)} buffers>"

    @property
    def loaded_share(self) -> float | None:
        if self.is_ready:
            return 1.0
        return min(self._dots, 100) / 100 if self._dots else None

    def buffers(self, *, draft: bool = False) -> dict[tuple[BufferPlace, BufferKind], int]:
        """The bytes of each buffer of the model, or of the draft model."""
        return {(place, kind): size for (of_draft, place, kind), size in self._buffers.items() if of_draft is draft}

    def bytes_by_node(self, head: str) -> dict[str, int]:
        """The bytes of weights, caches and compute buffers on each node's devices, with those of the draft model."""
        sizes: dict[str, int] = {}
        for (_draft, place, _kind), size in self._buffers.items():
            node = head if place.endpoint is None else self._nodes.get(place.endpoint)
            if node is not None:
                sizes[node] = sizes.get(node, 0) + size
        return sizes

    def feed(self, line: str) -> None:
        """Takes the next line, without its end. Never raises."""
        line = line[:MAX_LINE_LENGTH]
        if line and not line.strip("."):
            self._dots += len(line)
            return
        prefix = _PREFIX.match(line)
        assert prefix is not None, "each of its parts may be missing"
        text = line[prefix.end() :]
        if prefix["level"] == "E":
            self.last_error_line = printable(text)
        if self.error is None:
            self.error = find_error(text, self._nodes)
            self.effect = self.effect or find_effect(text)
        if self.is_ready:
            self._read_acceptance(text)
        else:
            self._read_progress(text)

    def _read_progress(self, text: str) -> None:
        if " buffer size = " in text:
            self._read_buffer(text)
        elif "using device " in text:
            match = _DEVICE.search(text)
            if match is not None and len(self.devices) < MAX_NAMES:
                self.devices.setdefault(match["name"], printable(match["description"], 80))
        elif "loading draft model" in text:
            self._is_draft = True
        elif "load_tensors: loading model tensors" in text:
            self.is_loading = True
        elif text.endswith(": model loaded"):
            self.is_ready = True

    def _read_buffer(self, text: str) -> None:
        match = _BUFFER.search(text)
        if match is None or len(self._buffers) >= MAX_NAMES:
            return
        kind = BufferKind(match["kind"])
        key = (self._is_draft, read_place(match["name"]), kind)
        size = round(float(match["mib"]) * 2**20)
        # A model with sliding windows has two KV caches on a device, a model in several files several buffers. Compute
        # buffers are reported again when they were reserved anew.
        earlier = 0 if kind is BufferKind.COMPUTE else self._buffers.get(key, 0)
        self._buffers[key] = earlier + size

    def _read_acceptance(self, text: str) -> None:
        if "draft acceptance" in text:
            match = _ACCEPTANCE.search(text)
            if match is not None:
                self.draft_accepted += int(match["accepted"])
                self.draft_proposed += int(match["proposed"])
