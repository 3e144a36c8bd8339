"""Keeps what was learned about hosts (rates and limits) in a file of the state folder, so that it survives a restart.

All meshes of a user that were started with ``gpumesh up`` share the file. A mesh for a single command only reads it. A
program that uses gpumesh as a library has no such file unless it names one. The file is written every few minutes and
at the end of the mesh, and only its owner can read it. It holds no prompt and no answer, only names of hosts and
models, and figures. A damaged file is ignored, with a line in the log: everything in it is learned again within a few
answers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Annotated, Protocol
from urllib.parse import urlsplit

import msgspec

from gpumesh.balancer.limits import NodeSlots
from gpumesh.balancer.rates import ServiceRates
from gpumesh.files import atomic_file

log = logging.getLogger(__name__)

FORMAT = 1
SAVE_INTERVAL_S = 180.0
MAX_FILE_BYTES = 8 << 20
# A host with more figures than this is not stored. Otherwise a host that shows endless models would push the others out
# of the file.
MAX_HOST_BYTES = 256 << 10
MAX_HOSTS = 1000  # with more, the hosts whose last save is longest ago are forgotten
MAX_KEY_CHARS = 1000


class LearningNode(Protocol):
    """The part of a node that is kept over a restart."""

    @property
    def host_key(self) -> str | None:
        """A name of the server that is the same after a restart: ``build_host_key``. ``None``: it is not known yet."""

    @property
    def server_version(self) -> str | None:
        """The version of the server; ``None`` if it is not known."""

    @property
    def rates(self) -> ServiceRates: ...

    @property
    def learned_slots(self) -> NodeSlots: ...


class _LearnedHost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was learned about one server. ``saved_at``: seconds since 1970. The rates and limits stay raw JSON until a
    node needs them."""

    server_version: Annotated[str, msgspec.Meta(max_length=MAX_KEY_CHARS)] | None
    saved_at: Annotated[float, msgspec.Meta(ge=0.0)]
    rates: msgspec.Raw
    limits: msgspec.Raw


_Hosts = dict[Annotated[str, msgspec.Meta(max_length=MAX_KEY_CHARS)], _LearnedHost]


class _LearnedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    format: Annotated[int, msgspec.Meta(ge=FORMAT, le=FORMAT)]
    hosts: _Hosts


def build_host_key(coordination_key: str, *, url: str, kind: str) -> str:
    """The key of a server in the file: its kind, its address on its host, and its GPUs or host (``coordination_key``).
    So two servers on one GPU have different keys."""
    return f"{kind} {url} {coordination_key}"


def build_shared_key(host_key: str) -> str:
    """The key of a server for all gateways, from its ``host_key``: they may reach the server at other addresses of its
    host, so of the address only the port remains."""
    kind, url, coordination_key = host_key.split(" ", 2)
    return f"{kind} {urlsplit(url).port} {coordination_key}"


def restore_figures(
    node: LearningNode, rates: msgspec.Raw, limits: msgspec.Raw, *, server_version: str | None, now: float
) -> None:
    """Gives a node figures that were learned about its server, for the models that the node has not used yet. Raises
    ValueError if they are damaged. ``now`` is in seconds of the node's clock.

    The limits are taken only if the server still has the same version: another version may have other defaults.
    """
    try:
        known_rates, known_limits = msgspec.json.decode(rates), msgspec.json.decode(limits)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    node.rates.restore(known_rates)
    if server_version is not None and server_version == node.server_version:
        node.learned_slots.restore(known_limits, now=now)


class LearnedState:
    """The file with what was learned. Reading and writing never fail: the reason for a failure is logged.

    ``read_only``: the file is never written. ``wall_clock`` returns seconds since 1970.
    """

    def __init__(self, path: Path, *, read_only: bool = False, wall_clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._read_only = read_only
        self._wall_clock = wall_clock
        self._hosts = _read_hosts(path)
        self._saved: dict[str, _LearnedHost] = {}  # the state of this mesh's hosts that was written last
        self._is_failing = False  # whether the last save has failed; the log says it once

    def __repr__(self) -> str:
        return f"<LearnedState {self._path} {len(self._hosts)} hosts{' failing' if self._is_failing else ''}>"

    def restore(self, node: LearningNode, now: float) -> None:
        """Gives a node what was learned about its server, for the models that the node has not used yet. Must be called
        when the node's key and version are known. ``now`` is in seconds of the node's clock."""
        host = None if node.host_key is None else self._hosts.get(node.host_key)
        if host is None:
            return
        try:
            restore_figures(node, host.rates, host.limits, server_version=host.server_version, now=now)
        except ValueError as error:
            log.warning(
                "%s: what was learned about %r is damaged, so it is ignored: %s", self._path, node.host_key, error
            )

    def saved_at(self, node: LearningNode) -> float | None:
        """When this file's figures of the node's server were saved, in seconds since 1970; ``None``: it has none."""
        host = None if node.host_key is None else self._hosts.get(node.host_key)
        return None if host is None else host.saved_at

    async def run(
        self, nodes: Iterable[LearningNode], *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """Saves every ``SAVE_INTERVAL_S``, and once more when it is cancelled. ``nodes`` is iterated over at each
        save."""
        try:
            while True:
                await sleep(SAVE_INTERVAL_S)
                self.save(nodes)
        finally:
            self.save(nodes)

    def save(self, nodes: Iterable[LearningNode]) -> None:
        """Writes the state of these nodes to the file, if the state has changed. The other hosts in the file stay. A
        failure is logged, and the next call tries again."""
        if self._read_only:
            return
        own = dict(self._collect_hosts(nodes))
        if own == self._saved:
            return
        hosts = _read_hosts(self._path) | own  # another mesh may have written meanwhile
        try:
            # Not synchronised with the disk, because that would block the event loop. A loss of power may cost the
            # file, and then everything is learned again.
            atomic_file.replace(self._path, _encode_file(hosts), sync=False)
        except OSError as error:  # no space or no permission: the mesh works without the file
            if not self._is_failing:
                log.warning("cannot save what was learned to %s: %s", self._path, error.strerror or error)
            self._is_failing = True
            return
        self._hosts, self._saved, self._is_failing = hosts, own, False

    def _collect_hosts(self, nodes: Iterable[LearningNode]) -> Iterable[tuple[str, _LearnedHost]]:
        """Yields the key and the state of each node about which something was learned. A state that has not changed
        since it was written is yielded as it was then, with its old ``saved_at``."""
        for node in nodes:
            key, rates, limits = node.host_key, node.rates, node.learned_slots.as_dict()
            nothing_is_learned = rates.is_empty and not limits
            if key is None or len(key) > MAX_KEY_CHARS or nothing_is_learned:
                continue
            try:
                raw_rates = msgspec.Raw(msgspec.json.encode(rates.as_dict()))
                raw_limits = msgspec.Raw(msgspec.json.encode(limits))
            except UnicodeEncodeError:  # the name of a model has a lone surrogate, which JSON cannot hold
                continue
            host = _LearnedHost(node.server_version, self._wall_clock(), raw_rates, raw_limits)
            saved = self._saved.get(key)
            if saved is not None and msgspec.structs.replace(host, saved_at=saved.saved_at) == saved:
                host = saved
            if len(raw_rates) + len(raw_limits) <= MAX_HOST_BYTES:
                yield key, host


def _encode_file(hosts: dict[str, _LearnedHost]) -> str:
    """The file's text: of the hosts that were saved last, as many as the bounds allow."""
    latest_first = sorted(hosts.items(), key=lambda item: item[1].saved_at, reverse=True)
    kept: dict[str, _LearnedHost] = {}
    size = 0
    for key, host in latest_first[:MAX_HOSTS]:
        size += len(msgspec.json.encode({key: host}))
        if size > MAX_FILE_BYTES // 2:  # half: so the file surely stays below the size at which it is not read
            break
        kept[key] = host
    return msgspec.json.encode(_LearnedFile(FORMAT, kept)).decode()


def _read_hosts(path: Path) -> dict[str, _LearnedHost]:
    """The hosts in the file; none if there is no file, or if it is damaged."""
    try:
        data = _read_own_file(path)
        return {} if data is None else msgspec.json.decode(data, type=_LearnedFile).hosts
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: JSON that is nested too deeply
        log.warning("%s is damaged, so it is ignored: %s", path, error)
        return {}


def _read_own_file(path: Path) -> bytes | None:
    """The content of the file; ``None`` if there is no file. Raises OSError, or ValueError, for a file that gpumesh
    does not write: a link, a pipe, a file that is too large, or a file that another user owns or may write to."""
    try:
        # O_NOFOLLOW refuses a link. O_NONBLOCK is for a FIFO: without it, opening a FIFO waits for its writer.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if hasattr(os, "geteuid"):  # not on Windows
            is_ours = status.st_uid == os.geteuid()
            others_may_write = bool(status.st_mode & 0o022)  # the bits "write" of the group and of all others
            if not is_ours or others_may_write:
                raise ValueError("other users may have written it")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError("it is too large")
    return data
