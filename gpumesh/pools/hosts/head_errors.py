"""The failures that llama-server names in its log, as errors of ours in clear words. Pure.

The lines are those of llama.cpp build 10434; docs/internals/pools.md has how each failure was made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from gpumesh.errors import (
    PoolDoesNotFit,
    PoolError,
    PoolFailed,
    PoolModelMissing,
    PoolProgramMissing,
    PoolVersionsDiffer,
)
from gpumesh.pools.hosts.buffer_places import read_place
from gpumesh.text.printable import printable

_MakeError = Callable[[re.Match[str], Mapping[str, str]], PoolError]


def _describe_device(name: str, nodes: Mapping[str, str]) -> tuple[str, str | None]:
    """A device in words, and its node; ``None``: the head."""
    place = read_place(name)
    if place.endpoint is None:
        return f"{printable(name, 40)} of the head", None
    node = nodes.get(place.endpoint)
    return f"device {place.number} of {node or place.endpoint}", node


def _no_memory(match: re.Match[str], nodes: Mapping[str, str]) -> PoolError:
    device, node = _describe_device(match["device"], nodes)
    size = f"{int(match['bytes']) / 2**20:,.0f} MiB" if match["bytes"] else "its buffer"
    return PoolDoesNotFit(
        f"{device} has not enough free memory: llama-server could not allocate {size} there",
        hint="something else may use its memory now; a smaller context or a smaller quantisation needs less",
        node=node,
    )


def _no_connection(match: re.Match[str], nodes: Mapping[str, str]) -> PoolError:
    node = nodes.get(match["endpoint"])
    return PoolFailed(f"the head cannot connect to the worker on {node or match['endpoint']}", node=node)


def _other_version(match: re.Match[str], _nodes: Mapping[str, str]) -> PoolError:
    return PoolVersionsDiffer(
        f"a worker speaks version {match['version']} of the RPC protocol, which the head's llama-server does not",
        hint="install the same build of llama.cpp on all members",
    )


def _worker_lost(_match: re.Match[str], _nodes: Mapping[str, str]) -> PoolError:
    return PoolFailed("the head lost the connection to a worker")


def _unknown_architecture(match: re.Match[str], _nodes: Mapping[str, str]) -> PoolError:
    return PoolModelMissing(
        f"the head's llama-server does not know models of the kind {printable(match['name'], 60)!r}",
        hint="install a newer llama.cpp on all members",
    )


def _no_file(match: re.Match[str], _nodes: Mapping[str, str]) -> PoolError:
    return PoolModelMissing(f"the head cannot open the model's file: {printable(match['reason'], 200)}")


def _broken_file(match: re.Match[str], _nodes: Mapping[str, str]) -> PoolError:
    return PoolModelMissing(
        f"the model's file is broken: {printable(match['reason'], 200)}",
        hint="get the file again, and compare its size",
    )


def _port_taken(match: re.Match[str], _nodes: Mapping[str, str]) -> PoolError:
    return PoolFailed(f"port {match['port']} on the head's host was taken meanwhile")


def _unknown_option(match: re.Match[str], _nodes: Mapping[str, str]) -> PoolError:
    return PoolProgramMissing(
        f"the head's llama-server does not know the option {printable(match['option'], 40)}",
        hint="install a newer llama.cpp on all members",
    )


def _no_library(match: re.Match[str], _nodes: Mapping[str, str]) -> PoolError:
    return PoolProgramMissing(
        f"llama.cpp cannot be started: {printable(match['reason'], 200)}",
        hint="install that library, or another build of llama.cpp",
    )


def _gpu_failed(match: re.Match[str], _nodes: Mapping[str, str]) -> PoolError:
    return PoolFailed(f"a GPU of the head failed: {printable(match['reason'], 200)}")


def _cannot_load(match: re.Match[str], _nodes: Mapping[str, str]) -> PoolError:
    return PoolModelMissing(f"llama-server cannot load the model: {printable(match['reason'], 200)}")


def _cannot_use(match: re.Match[str], _nodes: Mapping[str, str]) -> PoolError:
    return PoolModelMissing(
        f"llama-server cannot use the model with these settings: {printable(match['reason'], 200)}",
        hint="another `kv_type` or `context` of the pool may do",
    )


# A word that each line of an error has, so that most lines need no regular expression; the error's form; what it means.
_ERRORS: tuple[tuple[str, re.Pattern[str], _MakeError], ...] = (
    (
        "failed to allocate",
        re.compile(r"failed to allocate (?P<device>\S{1,80}) buffer of size (?P<bytes>[0-9]{1,15})"),
        _no_memory,
    ),
    ("unable to allocate", re.compile(r"unable to allocate (?P<device>\S{1,80}) buffer(?P<bytes>)"), _no_memory),
    ("version mismatch", re.compile(r"RPC server version mismatch: (?P<version>[0-9.]{1,15})"), _other_version),
    ("Failed to connect to", re.compile(r"Failed to connect to (?P<endpoint>[0-9.]{7,15}:[0-9]{1,5})"), _no_connection),
    ("RPC server crashed", re.compile(r"Remote RPC server crashed"), _worker_lost),
    (
        "unknown model architecture",
        re.compile(r"unknown model architecture: '(?P<name>[^']{0,100})"),
        _unknown_architecture,
    ),
    ("failed to open GGUF", re.compile(r"(?P<reason>failed to open GGUF file.{0,300})"), _no_file),
    ("corrupted or incomplete", re.compile(r"(?P<reason>tensor .{0,200}corrupted or incomplete)"), _broken_file),
    ("gguf_init_from", re.compile(r"(?P<reason>(?:failed to read|invalid magic).{0,200})"), _broken_file),
    ("couldn't bind", re.compile(r"couldn't bind HTTP server socket.*port: (?P<port>[0-9]{1,5})"), _port_taken),
    ("error: invalid argument", re.compile(r"error: invalid argument: (?P<option>\S{1,80})"), _unknown_option),
    ("shared libraries", re.compile(r"error while loading shared libraries: (?P<reason>.{1,300})"), _no_library),
    ("CUDA error", re.compile(r"CUDA error: (?P<reason>.{1,200})"), _gpu_failed),
    ("error loading model", re.compile(r"error loading model: (?P<reason>.{1,300})"), _cannot_load),
    ("failed to initialize the context", re.compile(r"initialize the context: (?P<reason>.{1,300})"), _cannot_use),
)


_UNKNOWN_DEVICE = re.compile(r"invalid device: (?P<device>\S{1,80})")


def find_error(text: str, nodes_by_endpoint: Mapping[str, str]) -> PoolError | None:
    """The failure that a line without its prefix names; ``None`` if it names none."""
    for word, pattern, make_error in _ERRORS:
        if word in text and (match := pattern.search(text)) is not None:
            return make_error(match, nodes_by_endpoint)
    return None


def find_effect(text: str) -> PoolError | None:
    """The failure that a line names which another failure may have caused: a device of the plan is not there.

    llama-server writes it to stderr at once, but the reason, that it cannot connect to a worker, from another thread.
    So this line may come first.
    """
    match = _UNKNOWN_DEVICE.search(text) if "invalid device" in text else None
    if match is None:
        return None
    return PoolFailed(
        f"the head's llama-server does not see the device {printable(match['device'], 40)} of the plan",
        hint="a worker may be missing, or the llama.cpp of the head is too old",
    )
