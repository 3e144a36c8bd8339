"""How long the loop stands still while a request's body is read, and how much CPU time that takes.

    python benchmarks/bodies.py [MIB]

For bodies of 64 MiB, unless said otherwise: ``json.loads`` (what was used until November 2026), msgspec, which skips
what it need not build, and ``gpumesh.gateway.json_members``, which does it in pieces. CPU time, which says less about
what else the machine does than the clock on the wall.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Callable

import msgspec

from gpumesh.gateway.json_members import scan_members

skipping = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


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


def took_ms(read: Callable[[bytes], object], body: bytes) -> float:
    began = time.process_time()
    read(body)
    return (time.process_time() - began) * 1e3


def in_pieces_ms(body: bytes) -> tuple[float, float]:
    """All together, and the longest."""
    longest, began = 0.0, time.process_time()
    last = began
    for _ in scan_members(body):
        now = time.process_time()
        longest, last = max(longest, now - last), now
    return (time.process_time() - began) * 1e3, longest * 1e3


def main() -> None:
    size = (int(sys.argv[1]) if len(sys.argv) > 1 else 64) << 20
    print(f"ms of CPU, {size >> 20} MiB    json.loads    msgspec    in pieces    its longest")
    for name, body in bodies(size).items():
        whole, longest = in_pieces_ms(body)
        print(f"{name:<24}{took_ms(json.loads, body):13.0f}{took_ms(skipping, body):11.0f}{whole:13.0f}{longest:15.1f}")


if __name__ == "__main__":
    main()
