"""Measures how long the event loop is blocked while a request's body is read, and how much CPU time the reading takes.

    python benchmarks/bodies.py [MIB]

Three readers are compared on bodies of MIB MiB (64 by default): ``json.loads`` (used until November 2026), msgspec,
which builds only the values that are asked for, and ``gpumesh.gateway.body_parsers.json_members``, which reads in
pieces. The figures are CPU time, which depends less on other load of the machine than wall time does.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Callable

import msgspec

from gpumesh.gateway.body_parsers.json_members import scan_members

read_top_level = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def bodies(size: int) -> dict[str, bytes]:
    image = base64.b64encode(os.urandom(3 << 20))
    return {
        "an image": b'{"model":"m","messages":[{"images":["' + image * (size // len(image)) + b'"]}]}',
        "a prompt": b'{"model":"m","prompt":"' + b"Why is the sky blue? " * (size // 21) + b'"}',
        "messages": b'{"model":"m","x":[' + b'{"role":"user","content":"hi"},' * (size // 31) + b"1]}",
        "[],[],[]": b'{"model":"m","x":[' + b"[]," * (size // 3) + b"1]}",
        "numbers": b'{"model":"m","x":[' + b"1," * (size // 2) + b"1]}",
        "escapes": b'{"model":"m","x":"' + b"\\u0041" * (size // 6) + b'"}',
    }


def cpu_ms(read: Callable[[bytes], object], body: bytes) -> float:
    started_at = time.process_time()
    read(body)
    return (time.process_time() - started_at) * 1e3


def in_pieces_ms(body: bytes) -> tuple[float, float]:
    """The time of all pieces together, and that of the longest piece."""
    longest_s, started_at = 0.0, time.process_time()
    piece_started_at = started_at
    for _ in scan_members(body):
        now = time.process_time()
        longest_s, piece_started_at = max(longest_s, now - piece_started_at), now
    return (time.process_time() - started_at) * 1e3, longest_s * 1e3


def main() -> None:
    size = (int(sys.argv[1]) if len(sys.argv) > 1 else 64) << 20
    print(f"ms of CPU, {size >> 20} MiB    json.loads    msgspec    in pieces    its longest")
    for name, body in bodies(size).items():
        in_pieces, longest = in_pieces_ms(body)
        whole = f"{cpu_ms(json.loads, body):13.0f}{cpu_ms(read_top_level, body):11.0f}"
        print(f"{name:<24}{whole}{in_pieces:13.0f}{longest:15.1f}")


if __name__ == "__main__":
    main()
