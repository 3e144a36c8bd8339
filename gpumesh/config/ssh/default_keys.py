"""The default identity files in ``~/.ssh``, in the order in which they are tried."""

from __future__ import annotations

from pathlib import Path

# The key files that ssh tries by default, without the kinds that only ssh itself can use (ssh_config(5)).
_DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


def find_default_keys(home: Path) -> tuple[Path, ...]:
    """The default identity files that exist in this home directory."""
    return tuple(key for name in _DEFAULT_KEYS if (key := home / ".ssh" / name).is_file())
