"""An account of a test's own on this machine: its home folder and login shell, which a real SSH server takes for real.

libnss_wrapper answers the server's look-ups of users from a file of ours. Nothing on the machine is changed. The
account has the id of the user who runs the tests, so that also a server without root may log it in.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.prerequisites import nss_wrapper, program
from tests.probes.shell_host import row

USER = "tester"
PASSWORD = "correct horse"


@dataclass
class Account:
    """``shell`` is the name of the login shell. ``files`` are the files in the home folder, by name. ``smi`` is the
    body of a ``sh`` script ``nvidia-smi`` in ``bin``; ``None``: there is no such program.

    ``started`` counts the runs of nvidia-smi.
    """

    folder: Path
    shell: str = "bash"
    files: dict[str, str] = field(default_factory=dict)
    smi: str | None = f"echo '{row()}'"
    has_password: bool = False

    def __post_init__(self) -> None:
        self.home.mkdir(mode=0o700, parents=True)
        (self.home / ".ssh").mkdir(mode=0o700)
        (self.home / "bin").mkdir()
        for name, text in self.files.items():
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if self.smi is not None:
            self._write_nvidia_smi(self.smi)
        self._write_databases()

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def path(self) -> str:
        """The value of PATH with nvidia-smi in it."""
        return f"{self.home}/bin:/usr/bin:/bin"

    @property
    def starts(self) -> int:
        """How often nvidia-smi was started for the table of GPUs."""
        trace = self.home / "starts"
        return len(trace.read_text().splitlines()) if trace.exists() else 0

    def lines(self, name: str) -> int:
        """The number of lines in a file of the home folder, which a test's shell writes; 0 without the file."""
        path = self.home / name
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wrapper(self) -> tuple[str, ...]:
        """The beginning of a command line that starts a server with this account."""
        return (
            "env",
            f"LD_PRELOAD={nss_wrapper()}",
            f"NSS_WRAPPER_PASSWD={self.folder / 'passwd'}",
            f"NSS_WRAPPER_GROUP={self.folder / 'group'}",
        )

    def authorize(self, public_key: str) -> None:
        path = self.home / ".ssh" / "authorized_keys"
        path.write_text(public_key)
        path.chmod(0o600)

    def _write_nvidia_smi(self, body: str) -> None:
        path = self.home / "bin" / "nvidia-smi"
        path.write_text(
            f'#!/bin/sh\ncase "$*" in *query-compute-apps*) exit 0;; esac\necho start >>"{self.home}/starts"\n{body}\n'
        )
        path.chmod(0o755)

    def _write_databases(self) -> None:
        shell = program(self.shell) or self.shell
        password = _hash_password() if self.has_password else "x"
        uid, gid = os.getuid(), os.getgid()
        lines = (
            f"{USER}:{password}:{uid}:{gid}::{self.home}:{shell}",
            "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin",  # sshd wants a user for its unprivileged part
        )
        (self.folder / "passwd").write_text("".join(line + "\n" for line in lines))
        (self.folder / "group").write_text(f"{USER}:x:{gid}:\n")


def _hash_password() -> str:
    command = [str(program("openssl")), "passwd", "-6", "-stdin"]
    return subprocess.run(
        command, input=PASSWORD, capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()
