"""Listening Unix sockets: what may be replaced at a path, and the names of tunnels' sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.config.listen_address import SOCKET_PATH_LIMIT
from gpumesh.errors import GPUMeshError
from gpumesh.topology import Target, TunnelListen, TunnelsSpec
from gpumesh.tunnels.listeners import Listeners
from gpumesh.tunnels.local_system.unix_sockets import (
    PathInUse,
    UnixListener,
    open_tunnel_listener,
)
from gpumesh.tunnels.local_system.unix_urls import split_unix_url, unix_url
from tests.prerequisites import needs
from tests.tunnels.supervised import descriptors

UNIX = TunnelsSpec(listen=TunnelListen.UNIX)


@pytest.fixture(autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def has_listener(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


# -- taking a path -----------------------------------------------------------------------------------------------------


def test_a_socket_has_mode_0600_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    before = os.umask(0)
    try:
        listener = UnixListener(path, 5)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert has_listener(path)
    listener.close()
    listener.close()
    assert not path.exists()


def test_the_socket_of_a_mesh_that_was_killed_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from gpumesh.tunnels.local_system.unix_sockets import UnixListener\n"
        "kept = UnixListener(Path(sys.argv[1]), 5)\nprint(flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        killed.stdout.readline()
        with pytest.raises(PathInUse, match="another program listens"):  # as long as it lives
            UnixListener(path, 5)
        killed.send_signal(signal.SIGKILL)
        killed.wait(30)
    assert path.is_socket()
    listener = UnixListener(path, 5)
    assert has_listener(path)
    listener.close()


def test_a_full_queue_is_no_stale_socket(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        waiting = []
        while True:
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            waiting.append(client)
            if client.connect_ex(str(path)):
                break
        with pytest.raises(PathInUse):
            UnixListener(path, 5)
        for client in waiting:
            client.close()


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file", "link to nothing", "link to a stale socket"])
def test_paths_that_are_no_socket_stay(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "x.sock", tmp_path / "other"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        if kind == "link to a file":
            other.write_text("precious")
        elif kind == "link to a stale socket":
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(other))
        path.symlink_to(other)
    before = path.lstat()
    with pytest.raises(PathInUse, match="is no socket"):
        UnixListener(path, 5)
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)


@needs("root")
def test_the_socket_of_another_user_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    os.chown(path, 12345, 12345)
    with pytest.raises(PathInUse, match="another user"):
        UnixListener(path, 5)
    assert path.lstat().st_uid == 12345


def test_close_does_not_remove_a_path_that_another_listener_has_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    first = UnixListener(path, 5)
    path.unlink()
    second = UnixListener(path, 5)
    first.close()
    assert has_listener(path)
    second.close()


async def test_of_several_processes_one_replaces_a_stale_socket(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom gpumesh.errors import GPUMeshError\n"
        "from gpumesh.tunnels.local_system.unix_sockets import UnixListener\n"
        "sys.stdin.readline()\n"
        "try:\n    kept = UnixListener(Path(sys.argv[1]), 5)\nexcept GPUMeshError:\n    print('no', flush=True)\n"
        "else:\n    print('yes', flush=True)\nsys.stdin.readline()\n"
    )
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    pipe = asyncio.subprocess.PIPE
    racers = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(path), stdin=pipe, stdout=pipe)
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write(b"\n")
    results = [await asyncio.wait_for(racer.stdout.readline(), 60) for racer in racers if racer.stdout is not None]
    assert sorted(results) == [b"no\n"] * 3 + [b"yes\n"]
    assert has_listener(path)
    for racer in racers:
        await racer.communicate(b"\n")


def test_a_failed_bind_leaves_no_descriptor(tmp_path: Path) -> None:
    before = descriptors()
    with pytest.raises(FileNotFoundError):
        UnixListener(tmp_path / "no" / "x.sock", 5)
    with pytest.raises(GPUMeshError, match=f"may have {SOCKET_PATH_LIMIT} bytes"):
        UnixListener(tmp_path / ("x" * 100), 5)
    assert descriptors() == before


# -- names of tunnels' sockets -----------------------------------------------------------------------------------------


def test_names_are_stable_and_meshes_with_equal_names_get_different_paths(runtime: Path) -> None:
    folder = runtime / "gpumesh"
    first = open_tunnel_listener("home", "iceland", 0, 5)
    assert first.path == folder / "home-iceland.sock"
    second = open_tunnel_listener("home", "iceland", 0, 5)
    assert second.path == folder / "home-iceland.2.sock"
    first.close()
    (folder / "home-iceland.sock").write_text("a user's file")
    third = open_tunnel_listener("home", "iceland", 0, 5)
    assert third.path == folder / "home-iceland.3.sock"
    for listener in (second, third):
        listener.close()
    assert (folder / "home-iceland.sock").read_text() == "a user's file"
    (folder / "home-iceland.sock").unlink()
    again = open_tunnel_listener("home", "iceland", 0, 5)
    assert again.path == folder / "home-iceland.sock"
    again.close()


def test_long_names_are_shortened_to_different_paths(runtime: Path) -> None:
    listeners = [open_tunnel_listener("m" * 63, "n" * 60 + letter, 0, 5) for letter in "abc"]
    paths = [listener.path for listener in listeners]
    assert len(set(paths)) == 3
    assert all(len(os.fsencode(path)) <= SOCKET_PATH_LIMIT for path in paths)
    assert all(has_listener(path) for path in paths)
    listeners.append(open_tunnel_listener("a/../b", "c\n", 0, 5))
    assert listeners[-1].path.parent == runtime / "gpumesh"
    for listener in listeners:
        listener.close()


def test_a_runtime_folder_with_too_long_a_path_raises_an_error(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = runtime / ("d" * 90)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(GPUMeshError, match="too long for a Unix socket") as caught:
        Listeners([Target("127.0.0.1", 1)], UNIX, node="n")
    assert "listen: tcp" in (caught.value.hint or "")


def test_closed_listeners_remove_their_paths(runtime: Path) -> None:
    listeners = Listeners(
        [Target("127.0.0.1", 1), Target("::1", 2, "https", "/api/")], UNIX, mesh_name="home", node="n"
    )
    one, two = listeners.paths
    assert list(listeners.urls.values()) == [f"http://unix:{one}:", f"https://unix:{two}:/api"]
    assert listeners.ports == ()
    listeners.close()
    listeners.close()
    assert list((runtime / "gpumesh").iterdir()) == []


# -- URLs --------------------------------------------------------------------------------------------------------------


@given(
    st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1).filter(
        lambda name: name != "."
    ),  # no file has it
    st.sampled_from(["http", "https"]),
    st.sampled_from(["", "/v1", "/a:b"]),
    st.sampled_from(["", "/api/tags", "/v1/models/hf.co:x/y:z"]),
)
def test_a_url_leads_back_to_its_path(name: str, scheme: str, prefix: str, call: str) -> None:
    path = Path("/run") / name.replace("/", "_")
    base = unix_url(path, scheme=scheme, prefix=prefix)
    assert base.startswith(f"{scheme}://unix:/run/")
    assert split_unix_url(base + call) == (str(path), prefix + call)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:80/api", "http://unix/api", "http://unix:80/x", "http://unix:/a/b", ""]
)
def test_other_urls_are_not_split(url: str) -> None:
    assert split_unix_url(url) is None
