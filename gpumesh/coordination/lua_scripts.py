"""Reads the Lua scripts that Redis runs for us, from the files of this package."""

from __future__ import annotations

from hashlib import sha1
from importlib import resources
from typing import NamedTuple


class LuaScript(NamedTuple):
    """``digest`` is the SHA-1 hash by which Redis knows the script."""

    text: str
    digest: str


def read_lua_script(package: str, names: tuple[str, ...]) -> LuaScript:
    """The script of these files in the folder ``lua`` of the package, one after the other: each uses what those before
    it define."""
    folder = resources.files(package) / "lua"
    text = "\n".join((folder / name).read_text("utf-8") for name in names)
    return LuaScript(text, sha1(text.encode(), usedforsecurity=False).hexdigest())
