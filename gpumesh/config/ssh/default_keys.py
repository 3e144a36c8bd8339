"""The default key files (identity files) in ``~/.ssh``, such as id_ed25519, in the order in which they are tried."""

from __future__ import annotations

from pathlib import Path

# The key files that ssh tries by default, without the kinds that only ssh itself can use (ssh_config(5)).
_DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


def find_default_keys(home: Path) -> tuple[Path, ...]:
    """Returns the paths of the default key files that exist in this home folder."""
    candidates = [home / ".ssh" / name for name in _DEFAULT_KEYS]
    return tuple(path for path in candidates if path.is_file())
