"""An input as a value: small as a file even where it is large on the wire."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
SLICE = 64 << 10


@dataclass(frozen=True, slots=True)
class Part:
    """``data``, so many ``times``. ``apart``: each time in a write of its own."""

    data: bytes
    times: int = 1
    apart: bool = False

    @property
    def size(self) -> int:
        return len(self.data) * self.times


@dataclass(frozen=True, slots=True)
class Case:
    """``target`` names what is fed: a row of ``parsers.TARGETS``, or one of ``wire``'s. ``note``: how it came about."""

    target: str
    parts: tuple[Part, ...]
    note: str = ""

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def data(self) -> bytes:
        return b"".join(part.data * part.times for part in self.parts)

    def writes(self) -> list[bytes]:
        """As they go on the wire: what belongs together in pieces of 64 KiB at most, the rest as it says."""
        found: list[bytes] = []
        together = bytearray()
        for part in self.parts:
            if part.apart:
                if together:
                    found.append(bytes(together))
                    together.clear()
                found += [part.data] * part.times
            else:
                together += part.data * part.times
        if together:
            found.append(bytes(together))
        return [piece[at : at + SLICE] for piece in found for at in range(0, len(piece), SLICE)]

    @property
    def name(self) -> str:
        return f"{self.target.replace('/', '-').replace(':', '-')}/{sha256(dump(self).encode()).hexdigest()[:12]}.json"


def dump(case: Case) -> str:
    """Bytes as the characters of Latin-1: a person can read most of them."""
    parts = [
        {"data": part.data.decode("latin-1")}
        | ({"times": part.times} if part.times != 1 else {})
        | ({"apart": True} if part.apart else {})
        for part in case.parts
    ]
    return json.dumps({"target": case.target, "note": case.note, "parts": parts}, indent=1) + "\n"


def load(path: Path) -> Case:
    document = json.loads(path.read_text())
    parts = tuple(
        Part(part["data"].encode("latin-1"), part.get("times", 1), part.get("apart", False))
        for part in document["parts"]
    )
    return Case(document["target"], parts, document["note"])


def save(case: Case, folder: Path) -> Path:
    """Under a name that follows from what it holds: the same finding is one file."""
    path = folder / case.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(case))
    return path


def corpus(*targets: str) -> list[Path]:
    """The files of these targets; of all when none is named."""
    return [path for path in sorted(CORPUS.rglob("*.json")) if not targets or load(path).target in targets]
