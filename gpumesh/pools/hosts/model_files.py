"""The file of a pool's model on the head's host, and its header: read over SSH, in a few MB.

The model is a GGUF file, or a model of the host's Ollama: its manifest names the blob with the weights, which is a GGUF
file too (docs/internals/ollama.md). Both are only read.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass

from gpumesh.errors import ExecError, PoolModelMissing
from gpumesh.pool_spec import is_model_path
from gpumesh.pools.base import ModelShape
from gpumesh.pools.gguf.errors import GgufError
from gpumesh.pools.gguf.header import NeedsMore, parse_header
from gpumesh.pools.hosts.route import HostRoute, is_host_path
from gpumesh.text.printable import printable
from gpumesh.tunnels.blocking import run_in_thread

TIMEOUT_S = 60.0  # for one piece of the header, also over a slow line
FIRST_BYTES = 1 << 20
MAX_HEADER_BYTES = 64 << 20
MAX_MANIFEST_BYTES = 1 << 20

_MARK = b"@gpumesh@"
# $1: the path; $2: how many bytes of the file's start. First comes a line with the file's size, and its path without
# ~ and links; then the bytes, compressed where that is possible: a tokenizer shrinks to a third. ``dd`` and not
# ``head -c``, which POSIX does not have.
_READ_SCRIPT = (
    "f=$1; case $f in \\~/*) f=$HOME/${f#??};; esac; "
    'if [ ! -e "$f" ]; then echo "@gpumesh@ missing"; exit 0; fi; '
    'if [ ! -f "$f" ] || [ ! -r "$f" ]; then echo "@gpumesh@ unreadable"; exit 0; fi; '
    's=$(wc -c <"$f"); r=$(readlink -f "$f") || r=$f; '
    'read_start() { dd if="$f" bs=65536 count=$(($1/65536)) 2>/dev/null; }; '
    "if command -v gzip >/dev/null; then z=gzip; else z=plain; fi; "
    'echo "@gpumesh@ $z $((s)) $r"; '
    'if [ $z = gzip ]; then read_start "$2" | gzip -1 -c; else read_start "$2"; fi'
)
# $1: the manifest's path below the folder of models. Ollama's own environment says where its models are; a process of
# another user can be read by root only. After it come the folders of Ollama's installer, of this user, and of Docker.
_MANIFEST_SCRIPT = (
    'try() { [ -n "$1" ] && [ -r "$1/manifests/$m" ] && { echo "@gpumesh@ $1"; cat "$1/manifests/$m"; exit 0; }; }; '
    "m=$1; "
    "for p in /proc/[0-9]*; do c=; { read -r c <$p/comm; } 2>/dev/null; case $c in ollama*) "
    'd=$(tr "\\000" "\\n" <$p/environ 2>/dev/null | sed -n "s/^OLLAMA_MODELS=//p"); try "$d"; '
    'd=$(tr "\\000" "\\n" <$p/environ 2>/dev/null | sed -n "s/^HOME=//p"); try "$d/.ollama/models";; esac; done; '
    'for d in "$OLLAMA_MODELS" /usr/share/ollama/.ollama/models "$HOME/.ollama/models" /root/.ollama/models '
    '/var/lib/ollama/models /var/lib/ollama/.ollama/models; do try "$d"; done; echo "@gpumesh@ missing"'
)
_WEIGHTS_TYPE = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NAME_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model's file on a host. ``path`` is absolute; ``file_bytes`` is its size."""

    path: str
    file_bytes: int
    shape: ModelShape


async def read_model(route: HostRoute, model: str, *, node: str, timeout_s: float = TIMEOUT_S) -> ModelFile:
    """Finds the model on the host, and reads its header. ``model`` is a path or a name, as in ``PoolSpec.model``;
    ``timeout_s`` is for each piece of the header.

    Raises PoolModelMissing when the host does not have the model, or its file cannot be used; TunnelDown; and ExecError
    when the host does not answer.
    """
    path = model if is_model_path(model) else await find_ollama_blob(route, model, node=node)
    wanted = FIRST_BYTES
    while True:
        path, file_bytes, data = await _read_start(route, path, wanted, node=node, timeout_s=timeout_s)
        try:
            # In a thread: the tokenizers of some models take half a second, and the gateway runs in this process.
            shape = await run_in_thread(parse_header, data, file_bytes=file_bytes)
        except GgufError as error:
            raise PoolModelMissing(f"{path} on {node} cannot be loaded: {error}", node=node) from error
        if not isinstance(shape, NeedsMore):
            return ModelFile(path, file_bytes, shape)
        if len(data) >= min(file_bytes, MAX_HEADER_BYTES):
            raise PoolModelMissing(f"{path} on {node} is cut: its header does not end", node=node)
        # At least twice as much: each call costs a round trip.
        wanted = min(max(shape.bytes, 2 * wanted), MAX_HEADER_BYTES)


async def _read_start(
    route: HostRoute, path: str, count: int, *, node: str, timeout_s: float
) -> tuple[str, int, bytes]:
    """The file's absolute path, its size, and at least its first ``count`` bytes (or all of a shorter file)."""
    blocks = -(-count // 65536)
    argv = ("sh", "-c", _READ_SCRIPT, "gpumesh-read", path, str(blocks * 65536))
    result = await route.exec(argv, timeout_s=timeout_s, limit_bytes=blocks * 65536 + (1 << 20))
    start = result.stdout.find(_MARK)
    line, _, data = result.stdout[max(start, 0) :].partition(b"\n")
    words = line.decode("utf-8", "replace").split(" ", 3)
    if start < 0 or len(words) < 2:
        raise ExecError(f"{node} did not run the script that reads the model's header", node=node)
    shown = printable(path)
    if words[1] == "missing":
        raise PoolModelMissing(f"there is no file {shown} on {node}", node=node)
    if words[1] == "unreadable":
        raise PoolModelMissing(f"{shown} on {node} is no file that may be read", node=node)
    if len(words) < 4 or not words[2].isdigit() or len(words[2]) > 18 or not is_host_path(words[3]):
        raise PoolModelMissing(f"{shown} on {node} is at a place that gpumesh cannot name", node=node)
    if words[1] == "gzip":
        data = await run_in_thread(_unpack, data, blocks * 65536, node)
    return words[3], int(words[2]), data


def _unpack(data: bytes, limit: int, node: str) -> bytes:
    """Unpacks gzip, at most ``limit`` bytes of content."""
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(data, limit)
    except zlib.error as error:
        raise ExecError(f"the header of the model on {node} came broken: {error}", node=node) from error


async def find_ollama_blob(route: HostRoute, model: str, *, node: str, timeout_s: float = TIMEOUT_S) -> str:
    """The path of the file with the weights of a model that the host's Ollama has. Raises as ``read_model``."""
    manifest_path = make_manifest_path(model)
    if manifest_path is None:
        raise PoolModelMissing(f"{model!r} is no name of a model, and no path of a file", node=node)
    argv = ("sh", "-c", _MANIFEST_SCRIPT, "gpumesh-manifest", manifest_path)
    result = await route.exec(argv, timeout_s=timeout_s, limit_bytes=MAX_MANIFEST_BYTES)
    start = result.stdout.find(_MARK)
    line, _, manifest = result.stdout[max(start, 0) :].partition(b"\n")
    folder = line.removeprefix(_MARK).decode("utf-8", "replace").strip()
    if start < 0 or (folder != "missing" and not is_host_path(folder)):
        raise ExecError(f"{node} did not run the script that looks for Ollama's models", node=node)
    if folder == "missing":
        raise PoolModelMissing(
            f"the Ollama on {node} does not have the model {model!r}, or its folder of models cannot be read",
            hint="pull it there, or give the pool the path of a GGUF file",
            node=node,
        )
    digest = read_weights_digest(manifest)
    if digest is None:
        raise PoolModelMissing(f"{model!r} on {node} has no file of weights that llama.cpp can load", node=node)
    return f"{folder}/blobs/sha256-{digest}"


def make_manifest_path(model: str) -> str | None:
    """The path of a model's manifest below Ollama's ``manifests``: ``registry.ollama.ai/library/qwen2.5/7b`` for
    ``qwen2.5:7b``. ``None`` for what is no name of a model. Ollama's types/model/name.go has the rule."""
    name = model.strip().removeprefix("https://").removeprefix("http://")
    head, _, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    parts = [*head.split("/")] if head else []
    if len(parts) == 0:
        parts = ["library"]
    if len(parts) == 1:
        parts = ["registry.ollama.ai", *parts]
    registry, *rest = parts
    registry_name, _, port = registry.partition(":")
    names = [registry_name, *rest, last, tag or "latest"]
    is_valid = len(rest) == 1 and all(_NAME_PART.fullmatch(part) for part in names) and (not port or port.isdigit())
    return "/".join((registry, *rest, last, tag or "latest")) if is_valid else None


def read_weights_digest(manifest: bytes) -> str | None:
    """The digest of the layer with the weights, in hexadecimal; ``None`` if the manifest has none. Never raises."""
    try:
        document = json.loads(manifest)
    except (ValueError, RecursionError):
        return None
    layers = document.get("layers") if isinstance(document, dict) else None
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict) and layer.get("mediaType") == _WEIGHTS_TYPE:
            match = _DIGEST.fullmatch(str(layer.get("digest")))
            if match is not None:
                return match[1]
    return None
