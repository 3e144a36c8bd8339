from __future__ import annotations

import pytest

from gpumesh.daemon.control_socket import framing


def test_a_message_is_one_line() -> None:
    line = framing.encode_line("Drain", {"node": "a\nb"})
    assert line.count(b"\n") == 1
    assert framing.decode_line(line) == ("Drain", {"kind": "Drain", "node": "a\nb"})


@pytest.mark.parametrize("line", [b"nonsense", b"[]", b"{}", b'{"kind": 5}', b"null"])
def test_another_line_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        framing.decode_line(line)
