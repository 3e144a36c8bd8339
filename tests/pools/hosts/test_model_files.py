"""A model's header, read from real files by real shells; Ollama's folders as its installer makes them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpumesh.errors import PoolModelMissing
from gpumesh.pools.hosts.model_files import make_manifest_path, read_model, read_weights_digest
from tests.pools.gguf.header_bytes import header, llama_keys, llama_tensors
from tests.pools.hosts.local_route import LocalRoute, local_route

SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]
DIGEST = "ab" * 32
MANIFEST = {
    "schemaVersion": 2,
    "layers": [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "00" * 32},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{DIGEST}", "size": 4},
    ],
}


def write_model(path: Path, words: int = 10) -> Path:
    """A model of ``words`` words, whose tokenizer makes the header long. Its weights are a hole in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = {**llama_keys(), "tokenizer.ggml.tokens": [f"word {number:06}" for number in range(words)]}
    data = header(keys, llama_tensors())
    path.write_bytes(data)
    os.truncate(path, len(data) + (64 << 20))
    return path


@pytest.fixture(params=SHELLS)
async def host(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LocalRoute]:
    shell = shutil.which(request.param)
    assert shell is not None
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    async with local_route((shell, "sh") if request.param == "busybox" else (shell,), environment) as route:
        yield route


async def test_a_file_in_the_home_folder(host: LocalRoute, tmp_path: Path) -> None:
    path = write_model(tmp_path / "my models/70b's.gguf")
    model = await read_model(host, "~/my models/70b's.gguf", node="iceland")
    assert model.path == str(path)
    assert model.file_bytes == path.stat().st_size
    assert model.shape.architecture == "llama"
    assert model.shape.layers > 0


async def test_a_long_header_is_read_in_pieces(host: LocalRoute, tmp_path: Path) -> None:
    write_model(tmp_path / "big.gguf", words=150_000)  # 3 MB
    model = await read_model(host, "~/big.gguf", node="iceland")
    assert model.shape.layers > 0


async def test_without_gzip_the_header_comes_as_it_is(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "dd", "wc", "readlink", "env"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    path = write_model(tmp_path / "big.gguf", words=100_000)
    async with local_route(environment={"PATH": str(programs)}) as host:
        assert (await read_model(host, str(path), node="iceland")).shape.layers > 0


async def test_a_model_of_ollama(host: LocalRoute, tmp_path: Path) -> None:
    folder = tmp_path / ".ollama/models"
    blob = write_model(folder / f"blobs/sha256-{DIGEST}")
    manifest = folder / "manifests/registry.ollama.ai/library/qwen2.5/7b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps(MANIFEST))
    assert (await read_model(host, "qwen2.5:7b", node="iceland")).path == str(blob)
    with pytest.raises(PoolModelMissing) as missing:
        await read_model(host, "qwen2.5:14b", node="iceland")
    assert missing.value.message.startswith("the Ollama on iceland does not have the model 'qwen2.5:14b'")


async def test_files_that_cannot_be_used(host: LocalRoute, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "text.gguf").write_text("hello")
    long_header = write_model(tmp_path / "cut.gguf", words=100)
    os.truncate(long_header, 500)
    for name, text in {
        "nowhere.gguf": "there is no file ~/nowhere.gguf on iceland",
        "folder.gguf": "~/folder.gguf on iceland is no file that may be read",
        "text.gguf": f"{tmp_path}/text.gguf on iceland cannot be loaded",
        "cut.gguf": "cut",
    }.items():
        with pytest.raises(PoolModelMissing) as error:
            await read_model(host, f"~/{name}", node="iceland")
        assert text in error.value.message


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("qwen2.5", "registry.ollama.ai/library/qwen2.5/latest"),
        ("qwen2.5:7b", "registry.ollama.ai/library/qwen2.5/7b"),
        ("me/mine:q4_K_M", "registry.ollama.ai/me/mine/q4_K_M"),
        ("hf.co/bartowski/Llama-3.3-70B-GGUF:Q4_K_M", "hf.co/bartowski/Llama-3.3-70B-GGUF/Q4_K_M"),
        ("localhost:5000/me/mine", "localhost:5000/me/mine/latest"),
        ("../../etc/passwd", None),
        ("a/../b", None),
        ("", None),
        ("a b", None),
        ("x:$(id)", None),
        (":7b", None),
        ("a/b/c/d", None),
    ],
)
def test_the_place_of_a_manifest(model: str, path: str | None) -> None:
    assert make_manifest_path(model) == path


@given(st.binary(max_size=100))
@example(b"[" * 100_000)
@example(b'{"layers": {"a": 1}}')
@example(b'{"layers": [1, null, {"mediaType": "application/vnd.ollama.image.model"}]}')
def test_any_manifest_is_read(manifest: bytes) -> None:
    assert read_weights_digest(manifest) is None


def test_a_digest_is_hexadecimal() -> None:
    for digest in ("sha256:../../etc/passwd", "md5:" + DIGEST, 5, None, "sha256:" + DIGEST[:-1]):
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": digest}]
        assert read_weights_digest(json.dumps({"layers": layers}).encode()) is None
