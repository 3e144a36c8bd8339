"""The paths of a mesh's control socket, lock and logs: one runtime folder and one log for each mesh.yaml.

`down` removes the runtime folder. The log stays, so that a person can read why the last mesh ended.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gpumesh.config import environment
from gpumesh.config.listen_address import SOCKET_PATH_LIMIT as SOCKET_PATH_LIMIT  # noqa: PLC0414 - the limit for all our sockets
from gpumesh.errors import GPUMeshError


@dataclass(frozen=True, slots=True)
class MeshPaths:
    """The paths for one mesh.yaml. Nothing is created before ``create_folder``."""

    config: Path
    folder: Path
    log: Path

    @property
    def socket(self) -> Path:
        return self.folder / "control.sock"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def access_log(self) -> Path:
        """The file with one line for each request to the gateway."""
        return self.log.with_suffix(".access.jsonl")

    @property
    def run_record(self) -> Path:
        """The file that a mesh has while it runs, and that a killed mesh leaves behind (``run_record.py``)."""
        return self.log.with_suffix(".running")

    @property
    def usage(self) -> Path:
        """The SQLite file with what each key, model and node has used (``gateway/usage``)."""
        return self.log.parent.parent / "usage" / f"{self.log.stem}.sqlite"

    @property
    def batches(self) -> Path:
        """The SQLite file with the batches of this mesh (``batches/``)."""
        return self.log.parent.parent / "batches" / f"{self.log.stem}.sqlite"

    @property
    def learned(self) -> Path:
        """The file with what was learned about hosts. All meshes of the user share it (``mesh/learned_state.py``)."""
        return self.log.parent.parent / "learned.json"

    @property
    def stderr_log(self) -> Path:
        """The file with the output of Python when the background process cannot even start; otherwise it is empty."""
        return self.log.with_suffix(".stderr")

    def create_folder(self) -> None:
        """Makes the runtime folder, for this user alone. Raises GPUMeshError when that is not possible."""
        if len(str(self.socket).encode()) > SOCKET_PATH_LIMIT:
            raise GPUMeshError(
                f"the control socket's path is longer than a Unix socket's may be: {self.socket}",
                hint="set XDG_RUNTIME_DIR to a folder with a shorter path",
            )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)  # if the folder existed already, ``mkdir`` has left its mode as it was
        except OSError as error:
            raise GPUMeshError(
                f"cannot use the runtime folder {self.folder}: {error.strerror}",
                hint="set XDG_RUNTIME_DIR to a folder of your own",
            ) from error

    def remove_files(self) -> None:
        """Removes all files of the runtime folder, the lock last, then the folder and an empty ``stderr_log``.

        Only the holder of the lock may call this. A file that cannot be removed stays.
        """
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name != self.lock.name:
                    with suppress(OSError):
                        os.unlink(entry.path)
        with suppress(OSError):
            self.lock.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
        with suppress(OSError):
            if self.stderr_log.stat().st_size == 0:
                self.stderr_log.unlink()


def for_config(config: Path) -> MeshPaths:
    """Returns the paths for the mesh.yaml ``config``. A relative path or a link to the file gives the same paths.

    A mesh that a service of the whole system runs has no XDG_RUNTIME_DIR, while the same user's shell has. So if there
    is no lock in the runtime folder of this process, the user's other runtime folder is looked at too.
    """
    resolved = config.resolve()
    # Only 16 digits of the hash, because the path of a Unix socket may not be long.
    key = hashlib.sha256(str(resolved).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    log = environment.state_dir() / "logs" / f"{key}.jsonl"
    paths = MeshPaths(config=resolved, folder=environment.runtime_dir() / key, log=log)
    if paths.lock.exists():
        return paths
    others = (replace(paths, folder=folder / key) for folder in environment.runtime_dirs())
    return next((other for other in others if other.lock.exists()), paths)
