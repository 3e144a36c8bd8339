"""The messages between a benchmark and the process of its load generator: one line of JSON each, over pipes.

API keys travel in these messages, and in no arguments or variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from gpumesh.backends.base import ChatRequest
from gpumesh.bench.load.conditions import LoadConditions, Via
from gpumesh.bench.load.http.raw_sender import Endpoint
from gpumesh.bench.load.samples import ClientLoad, LoadSample

LINE_LIMIT = 64 << 20  # the longest message in bytes: a request with a prompt of 200,000 tokens has about 1 MB
SAMPLES_PER_MESSAGE = 100


class OpenStage(msgspec.Struct, frozen=True, tag="open-stage"):
    """A stage comes: its name, and how and where its requests are sent. ``concurrency``, ``duration_s``
    and ``think_s``: as in ``Stage``. ``timeout_s``: for a request with its answer. ``mesh_pid``: the mesh's process.
    ``keeps_texts``: the samples have the texts of the answers."""

    name: str
    concurrency: int | None
    duration_s: float | None
    think_s: float
    endpoints: tuple[Endpoint, ...]
    via: Via
    timeout_s: float
    mesh_pid: int | None
    keeps_texts: bool = False


class AddRequest(msgspec.Struct, frozen=True, tag="add-request"):
    """The next request of the stage, as in ``PlannedRequest``."""

    chat: ChatRequest
    node: str | None
    at_s: float | None
    conversation: int | None = None


class BeginStage(msgspec.Struct, frozen=True, tag="begin-stage"):
    """All requests have come: the stage begins."""


class StopStage(msgspec.Struct, frozen=True, tag="stop-stage"):
    """The stage that runs is to end now. What was measured until now is reported as at its end."""


class StageBegan(msgspec.Struct, frozen=True, tag="stage-began"):
    """``start_s``: the start of the stage, on ``time.perf_counter``, which is the same for all processes."""

    start_s: float


class RequestEnded(msgspec.Struct, frozen=True, tag="request-ended"):
    """A request has ended. Its answer is not parsed yet: the sample has no pieces and no counts."""

    sample: LoadSample


class Samples(msgspec.Struct, frozen=True, tag="samples"):
    """Samples of the stage that has ended."""

    samples: tuple[LoadSample, ...]


class StageEnded(msgspec.Struct, frozen=True, tag="stage-ended"):
    """The stage has ended, and all its samples have been sent."""

    duration_s: float
    client: ClientLoad
    conditions: LoadConditions


class GeneratorFailed(msgspec.Struct, frozen=True, tag="generator-failed"):
    """A fault of the load generator. ``traceback`` is for its developers."""

    message: str
    traceback: str


ToGenerator = OpenStage | AddRequest | BeginStage | StopStage
FromGenerator = StageBegan | RequestEnded | Samples | StageEnded | GeneratorFailed


def _encode_mapping(value: Any) -> Any:
    """What msgspec cannot encode by itself: the options of a request may be a read-only mapping."""
    if isinstance(value, (Mapping, MappingProxyType)):
        return dict(value)
    raise NotImplementedError(f"a {type(value).__name__} is no part of a message")


_encoder = msgspec.json.Encoder(enc_hook=_encode_mapping)
_to_generator = msgspec.json.Decoder(ToGenerator)
_from_generator = msgspec.json.Decoder(FromGenerator)


def encode(message: ToGenerator | FromGenerator) -> bytes:
    """The line of a message."""
    return _encoder.encode(message) + b"\n"


def decode_to_generator(line: bytes) -> ToGenerator:
    """The message for the load generator in a line. Raises ``ValueError`` (``msgspec.DecodeError``)."""
    return _to_generator.decode(line)


def decode_from_generator(line: bytes) -> FromGenerator:
    """The message of the load generator in a line. Raises ``ValueError`` (``msgspec.DecodeError``)."""
    return _from_generator.decode(line)
