"""The values of batches: what crosses the boundaries of this room.

The model is that of OpenAI's batch API. A *file* has lines. A *batch* has an input file, an endpoint, a window and a
status. Each good line of the input file is a *request*; each bad line is a ``LineError``. A request has at most one
*result*: a line of the batch's output file, or of its error file if it failed.

::

    create_batch ─► VALIDATING ─► IN_PROGRESS ─► COMPLETED   every request has a result
                     │   │            │ │ └────► EXPIRED     … and some of these say that the window has passed
                     │   │            │ └──────► CANCELLING ─► CANCELLED   requests without a result are left
                     │   └────────────┴────────────────────────► CANCELLED   … if no request is under way
                     └─► FAILED   no line of the file is good

    COMPLETED, EXPIRED, CANCELLED ── retry ─► IN_PROGRESS

All times are seconds since 1970, by the store's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

PROMPT_ENDPOINT = "prompt"
"""The endpoint of batches whose lines are prompts as those of ``gpumesh run -f``, and whose results are as its results.
All other endpoints are paths of OpenAI's API, such as ``/v1/chat/completions``."""

COMMAND_LINE = ""
"""The owner of files and batches that were made without an API key: by commands, and by clients of a gateway that needs
no key."""

DEFAULT_WINDOW_S = 24 * 3600.0
MAX_LINE_BYTES = 16 << 20  # a longer line of an input file is a bad line
MAX_CLAIM_BYTES = 32 << 20  # the contents of the claims of one call of ``claim`` have about so many bytes at most
MAX_KEPT_ERRORS = 100  # so many bad lines of a batch are kept with their reasons; the others are counted
KEPT_S = 30 * 24 * 3600.0  # so long a batch is kept after its end, and a file after its last use


class BatchStatus(StrEnum):
    """Where a batch stands, by the names of OpenAI's API. A store may go past FINALIZING and CANCELLING in one step."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        """Whether the status is a last one; only ``retry`` changes it."""
        return self in _ENDED


_ENDED = frozenset({BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED})


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a store. ``name`` is the name that its maker gave it, ``size`` its length in bytes, ``purpose`` a word
    of OpenAI's API (``batch``). ``owner``: the ``usage_name`` of the API key with which it was made."""

    id: str
    name: str
    size: int
    created_at: float
    purpose: str = "batch"
    owner: str = COMMAND_LINE


@dataclass(frozen=True, slots=True)
class LineError:
    """What is wrong with a line of an input file. ``line`` counts from 1; 0 stands for the whole file. ``code`` is a
    short word for programs, ``message`` a sentence for people."""

    line: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What the maker of a batch decides. ``name`` is shown to people. ``window_s``: the seconds from the creation until
    the requests without a result fail. ``metadata``: of OpenAI's API, kept as it is."""

    endpoint: str
    input_file_id: str
    name: str = ""
    window_s: float = DEFAULT_WINDOW_S
    owner: str = COMMAND_LINE
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """The requests of a batch. ``total`` are all good lines that were read so far; ``completed`` and ``failed`` have a
    result; ``claimed`` are under way now, in any process. ``output_bytes`` and ``error_bytes`` are the sizes of the
    results, with a line break for each."""

    total: int = 0
    completed: int = 0
    failed: int = 0
    claimed: int = 0
    output_bytes: int = 0
    error_bytes: int = 0

    @property
    def unfinished(self) -> int:
        """The number of requests without a result."""
        return self.total - self.completed - self.failed


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as it is now. ``expires_at``: the end of its window. Each of the other times is that of the latest change
    to a status, ``None`` if there was none; ``ended_at`` is that of the last status.

    ``read_lines``: how many lines of the input file were read so far. ``errors`` are the bad lines, ``MAX_KEPT_ERRORS``
    of them at most, ``error_count`` is the number of all.
    """

    id: str
    new: NewBatch
    status: BatchStatus
    created_at: float
    expires_at: float
    counts: BatchCounts = BatchCounts()
    in_progress_at: float | None = None
    cancelling_at: float | None = None
    ended_at: float | None = None
    read_lines: int = 0
    errors: tuple[LineError, ...] = ()
    error_count: int = 0


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A good line of an input file. ``offset`` and ``size``: where its bytes stand in the file, without line break.

    Requests are claimed by ``order``, and those of equal ``order`` by ``line``: ``order`` is the same, or has the same
    beginning, for prompts that share a prefix. ``group`` is a short text that is the same for such prompts; a Sender
    uses it as the session."""

    line: int
    offset: int
    size: int
    order: bytes = b""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that a worker works on. ``content``: the bytes of its line. ``tries``: how often it was released with
    ``counts`` before. ``lost``: how often its lease has ended because its worker was killed. ``expires_at``: the end of
    the batch's window. ``token`` is for the store."""

    batch_id: str
    line: int
    content: bytes
    endpoint: str
    owner: str
    group: str
    expires_at: float
    tries: int = 0
    lost: int = 0
    token: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """What tells a request from all others: its batch and its line."""
        return self.batch_id, self.line


@dataclass(frozen=True, slots=True)
class Release:
    """A claimed request that goes back without a result. Nobody gets it for ``delay_s`` seconds. ``counts``: it was
    tried, and has failed."""

    claim: Claim
    delay_s: float = 0.0
    counts: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a claimed request. ``content``: the line of the output file, or of the error file if ``failed``,
    without line break. ``expired``: it failed because the window has passed."""

    claim: Claim
    content: bytes
    failed: bool = False
    expired: bool = False


@dataclass(frozen=True, slots=True)
class RecordedResult:
    """A result of a batch. ``position`` says where to go on reading (``BatchStore.read_results``). ``line``: the line
    of the input file."""

    position: str
    line: int
    content: bytes
    failed: bool


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A request as a Sender gets it. ``body``: what is sent to the endpoint, JSON in UTF-8; for ``PROMPT_ENDPOINT`` the
    whole line. ``id`` names it in logs. ``custom_id`` is the name that the file gives it, empty if it gives none.
    ``session``: the same for requests that share a prefix. ``timeout_s``: for all of it, queueing included."""

    id: str
    batch_id: str
    line: int
    custom_id: str
    endpoint: str
    owner: str
    body: bytes
    session: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server has answered: any HTTP status, and the whole body. For ``PROMPT_ENDPOINT`` the body is a JSON
    object with the members of a result of ``gpumesh run -f``, without ``index`` and ``prompt``. ``attempts``: on how
    many nodes it was tried. ``retry_after_s``: what the answer says about another try; ``None``: nothing."""

    status: int
    body: bytes
    node: str | None = None
    attempts: int = 1
    retry_after_s: float | None = None
