from __future__ import annotations

import pytest

from gpumesh.backends.body_pieces import COPY_BYTES, join_pieces


@pytest.mark.parametrize("size", [1, 1000, COPY_BYTES // 2, COPY_BYTES, COPY_BYTES + 1, 5 * COPY_BYTES])
def test_no_step_copies_much_more_than_it_may_however_small_the_pieces_are(size: int) -> None:
    count = max(8 * COPY_BYTES // size, 3) if size >= 1000 else 5000
    pieces = [bytes([index % 251]) * size for index in range(count)]
    work, steps = join_pieces(pieces), 0
    while True:
        try:
            next(work)
            steps += 1
        except StopIteration as stop:
            assert stop.value == b"".join(pieces)
            break
    assert steps >= size * count // (2 * COPY_BYTES)
