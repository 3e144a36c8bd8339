from __future__ import annotations

import pytest

from gpumesh.cli.chat.message_text import is_open, split_command, unquote


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"""', True),
        ('"""a', True),
        ('"""a\nb', True),
        ('  """a', True),
        ('"""a"""', False),
        ('"""a\nb"""  ', False),
        ('/set system """a', True),
        ('/set system """a"""', False),
        ('"""def f():\n    """Doc."""\n    return 1', True),
        ('def f():\n    """Doc.', False),
        ("", False),
        ("hello", False),
    ],
)
def test_whether_a_quotation_is_open(text: str, expected: bool) -> None:
    assert is_open(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"""a\nb"""', "a\nb"),
        ('"""', ""),
        (" hello ", "hello"),
        ('he said """x"""', 'he said """x"""'),
        ('"""\n/bye\n"""', "/bye"),
    ],
)
def test_unquote(text: str, expected: str) -> None:
    assert unquote(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/bye", ("bye", "")),
        (" /Model  llama3.2 ", ("model", "llama3.2")),
        ('/set system """a\nb"""', ("set", 'system """a\nb"""')),
        ("/?", ("?", "")),
        ("/etc/hosts what is it?", None),
        ("hello /bye", None),
        ('"""/bye"""', None),
        ("/", None),
    ],
)
def test_split_command(text: str, expected: tuple[str, str] | None) -> None:
    assert split_command(text) == expected
