from __future__ import annotations

import asyncio
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.limits import NodeSlots
from gpumesh.balancer.rates import ServiceRates
from gpumesh.mesh import learned_state
from gpumesh.mesh.learned_state import MAX_FILE_BYTES, MAX_HOSTS, LearnedState, build_host_key

MODEL = "qwen2.5:7b"


@dataclass
class FakeNode:
    host_key: str | None = "ollama http://127.0.0.1:11434 GPU-1"
    server_version: str | None = "0.33.1"
    rates: ServiceRates = field(default_factory=ServiceRates)
    learned_slots: NodeSlots = field(default_factory=NodeSlots)


def serve(node: FakeNode, token_s: float = 0.01, model: str = MODEL) -> None:
    """The node answers four streams at the same time."""
    node.rates.learn(model, tokens=100, eval_s=100 * token_s, unread_tokens=1000, prompt_s=0.5, load_s=4.0)
    requests = [node.learned_slots.note_sent(model, 0.0) for _ in range(4)]
    for request in requests:
        node.learned_slots.note_first_token(request, 0.1)
    for request in requests:
        node.learned_slots.note_answer(request, 2.0, waited_ms=0.0, total_ms=2000.0, load_ms=0.0)


def learned_node(key: str | None = FakeNode.host_key, token_s: float = 0.01) -> FakeNode:
    node = FakeNode(key)
    serve(node, token_s)
    return node


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "learned.json"


def restored(path: Path, node: FakeNode | None = None) -> FakeNode:
    node = node or FakeNode()
    LearnedState(path).restore(node, now=1000.0)
    return node


def test_what_was_learned_survives_a_restart(path: Path) -> None:
    LearnedState(path).save([learned_node()])
    node = restored(path)
    assert node.rates.decode_s(MODEL, 100) == pytest.approx(1.0)
    assert node.rates.prefill_s(MODEL, 1000) == pytest.approx(0.5)
    assert node.rates.load_s(MODEL) == 4.0
    assert node.learned_slots.limit(MODEL).proven == 4
    assert path.stat().st_mode & 0o777 == 0o600


def test_limits_are_taken_only_for_the_same_version_of_the_server(path: Path) -> None:
    LearnedState(path).save([learned_node()])
    for version in ("0.34.0", None):
        node = restored(path, FakeNode(server_version=version))
        assert node.rates.is_measured(MODEL)
        assert node.learned_slots.limit(MODEL).proven == 1


def test_a_server_of_unknown_version_has_no_stored_limits(path: Path) -> None:
    node = learned_node()
    node.server_version = None
    LearnedState(path).save([node])
    assert restored(path, FakeNode(server_version=None)).learned_slots.limit(MODEL).proven == 1


def test_other_hosts_get_nothing(path: Path) -> None:
    LearnedState(path).save([learned_node()])
    assert restored(path, FakeNode("another host")).rates.is_empty
    assert restored(path, FakeNode(None)).rates.is_empty


def test_servers_on_one_gpu_have_keys_of_their_own() -> None:
    one = build_host_key("GPU-1", url="http://127.0.0.1:11434", kind="ollama")
    other = build_host_key("GPU-1", url="http://127.0.0.1:8000", kind="openai")
    assert one != other
    assert one == build_host_key("GPU-1", url="http://127.0.0.1:11434", kind="ollama")


def test_nodes_without_anything_learned_do_not_erase_what_is_stored(path: Path) -> None:
    LearnedState(path).save([learned_node()])
    LearnedState(path).save([FakeNode(), learned_node("another host"), learned_node(None)])
    assert restored(path).rates.is_measured(MODEL)
    assert restored(path, FakeNode("another host")).rates.is_measured(MODEL)


def test_two_meshes_do_not_erase_each_others_hosts(path: Path) -> None:
    first, second = LearnedState(path), LearnedState(path)
    first.save([learned_node("first")])
    second.save([learned_node("second")])
    first.save([learned_node("first", token_s=0.02)])
    assert restored(path, FakeNode("second")).rates.decode_s(MODEL, 100) == pytest.approx(1.0)
    assert restored(path, FakeNode("first")).rates.decode_s(MODEL, 100) == pytest.approx(2.0)


def test_the_file_is_written_only_when_something_has_changed(path: Path) -> None:
    state, node = LearnedState(path), learned_node()
    state.save([])
    assert not path.exists()
    state.save([node])
    path.unlink()
    state.save([node])
    assert not path.exists()
    serve(node, 0.02)
    state.save([node])
    assert path.exists()


async def test_it_is_saved_every_few_minutes_and_at_the_end(path: Path) -> None:
    node, asked = FakeNode(), asyncio.Event()
    wakeups: asyncio.Queue[None] = asyncio.Queue()

    async def sleep(seconds: float) -> None:
        assert seconds == learned_state.SAVE_INTERVAL_S
        asked.set()
        await wakeups.get()
        asked.clear()

    task = asyncio.create_task(LearnedState(path).run([node], sleep=sleep))
    await asked.wait()
    serve(node)
    wakeups.put_nowait(None)
    while not path.exists():
        await asyncio.sleep(0)
    serve(node, model="other:latest")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert restored(path).rates.is_measured("other:latest")


# -- damaged and hostile files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format":1}',
        '{"format":2,"hosts":{}}',
        '{"format":1,"hosts":{},"more":1}',
        '{"format":1,"hosts":{"h":{}}}',
        '{"format":1,"hosts":{"h":{"server_version":1,"saved_at":1,"rates":{},"limits":{}}}}',
        '{"format":1,"hosts":{"h":{"server_version":"1","saved_at":-1,"rates":{},"limits":{}}}}',
        '{"format":1,"hosts":{"h":{"server_version":"1","saved_at":NaN,"rates":{},"limits":{}}}}',
        '{"format":1,"hosts":' + "[" * 100_000,
        "\ud800",
    ],
)
def test_a_damaged_file_is_ignored_and_replaced(path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with caplog.at_level(logging.WARNING):
        state = LearnedState(path)
    assert "damaged" in caplog.text
    state.restore(FakeNode(), now=0.0)
    state.save([learned_node()])
    assert restored(path).rates.is_measured(MODEL)


@pytest.mark.parametrize(
    ("rates", "limits"),
    [
        ("{}", "{}"),
        ("5", "{}"),
        ('{"format":1,"decode":{"m":{"token_s":0,"share":0}},"prefill":{},"load":{}}', "{}"),
        ('{"format":1,"decode":{},"prefill":{},"load":{}}', '{"m":{"proven":0,"search":"known"}}'),
        ('{"format":1,"decode":{},"prefill":{},"load":{"m":1e999}}', "{}"),
    ],
)
def test_damaged_figures_of_a_host_are_ignored(
    path: Path, rates: str, limits: str, caplog: pytest.LogCaptureFixture
) -> None:
    host = f'{{"server_version":"0.33.1","saved_at":1,"rates":{rates},"limits":{limits}}}'
    path.write_text(f'{{"format":1,"hosts":{{{json.dumps(FakeNode.host_key)}:{host}}}}}')
    path.chmod(0o600)
    with caplog.at_level(logging.WARNING):
        node = restored(path)
    assert "damaged" in caplog.text
    assert node.rates.is_empty
    assert node.learned_slots.as_dict() == {}


@given(st.binary(max_size=200), st.integers(0, 10_000))
def test_any_bytes_do_no_harm(tmp_path_factory: pytest.TempPathFactory, noise: bytes, position: int) -> None:
    path = tmp_path_factory.mktemp("noise") / "learned.json"
    LearnedState(path).save([learned_node()])
    data = path.read_bytes()
    position %= len(data)
    path.write_bytes(data[:position] + noise + data[position + len(noise) :])
    node = restored(path)
    assert 1 <= node.learned_slots.limit(MODEL).proven <= 512
    assert 0.0 < node.rates.decode_s(MODEL, 1) <= 60.0


def test_files_that_others_may_have_made_are_ignored(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    LearnedState(path).save([learned_node()])
    path.chmod(0o622)
    assert restored(path).rates.is_empty
    path.chmod(0o600)
    link = path.with_name("link.json")
    link.symlink_to(path)
    assert restored(link).rates.is_empty
    pipe = path.with_name("pipe.json")
    os.mkfifo(pipe)
    assert restored(pipe).rates.is_empty
    path.write_bytes(b" " * (MAX_FILE_BYTES + 1))
    assert restored(path).rates.is_empty
    assert caplog.text.count("ignored") == 4


# -- bounds and failures ---------------------------------------------------------------------------------------------


def test_the_hosts_that_were_saved_longest_ago_are_forgotten(path: Path) -> None:
    times = iter(range(1, 10_000))
    state = LearnedState(path, wall_clock=lambda: float(next(times)))
    state.save([learned_node(f"host {number}") for number in range(MAX_HOSTS + 5)])
    hosts = json.loads(path.read_text())["hosts"]
    assert len(hosts) == MAX_HOSTS
    assert "host 0" not in hosts
    assert f"host {MAX_HOSTS + 4}" in hosts


def test_a_host_with_absurd_names_is_not_stored(path: Path) -> None:
    crowded, surrogate, long_key = FakeNode("crowded"), FakeNode("surrogate"), learned_node("k" * 2000)
    for number in range(256):
        crowded.rates.learn(
            f"{number}".rjust(400, "m"), tokens=100, eval_s=1.0, load_s=3.0, unread_tokens=99, prompt_s=1.0
        )
    surrogate.rates.learn("\ud800", load_s=3.0)
    LearnedState(path).save([crowded, surrogate, long_key, learned_node()])
    assert list(json.loads(path.read_text())["hosts"]) == [FakeNode.host_key]


def test_the_file_stays_small_enough_to_be_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_state, "MAX_FILE_BYTES", 4000)
    LearnedState(path).save([learned_node(f"host {number}") for number in range(100)])
    assert 1000 < path.stat().st_size < 4000
    LearnedState(path)


def test_a_folder_that_cannot_be_written_to_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = LearnedState(tmp_path / "missing" / "learned.json")
    node = learned_node()
    state.save([node])
    state.save([node])
    assert caplog.text.count("cannot save") == 1
    assert "failing" in repr(state)
    (tmp_path / "missing").mkdir()
    state.save([node])
    assert "1 hosts" in repr(state)
    assert "failing" not in repr(state)
