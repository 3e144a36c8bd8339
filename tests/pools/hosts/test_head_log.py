"""llama-server's log: what it tells, what fails, and what a plan makes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.pools.hosts.buffer_places import BufferPlace
from gpumesh.pools.hosts.commands import nodes_by_endpoint
from gpumesh.pools.hosts.comparison import compare_with_plan
from gpumesh.pools.hosts.head_log import BufferKind, HeadLog
from tests.pools.hosts.head_logs import DRAFT, LOADED, MIB, READY, TIMING, WORKERS, head_programs, make_plan


def read(*lines: str) -> HeadLog:
    log = HeadLog(nodes_by_endpoint(WORKERS))
    for line in lines:
        log.feed(line)
    return log


def problems_of(log: HeadLog) -> tuple[str, ...]:
    return compare_with_plan(make_plan(), log, programs=head_programs(), workers=WORKERS)


def test_a_load_from_its_start_to_its_end() -> None:
    log = read(*LOADED[:5])
    assert not log.is_loading
    assert log.devices == {
        "RPC0": "127.0.0.1:21001", "RPC1": "127.0.0.1:21002", "CUDA0": "NVIDIA GeForce RTX 4090"
    }  # fmt: skip
    log = read(*LOADED)
    assert log.is_loading
    assert not log.is_ready
    assert log.loaded_share is None
    log.feed("." * 30)
    log.feed("." * 12)
    assert log.loaded_share == 0.42
    for line in READY:
        log.feed(line)
    assert log.is_ready
    assert log.loaded_share == 1.0
    assert log.error is None
    buffers = log.buffers()
    worker = BufferPlace("RPC", "127.0.0.1:21001", 0)
    assert round(buffers[worker, BufferKind.MODEL] / MIB, 2) == 3000.10
    assert buffers[worker, BufferKind.KV] == 300 * MIB, "a model with windows has two caches"
    assert buffers[worker, BufferKind.COMPUTE] == 300 * MIB, "the last reservation counts"
    assert round(log.bytes_by_node("iceland")["attic"] / MIB, 2) == 1400.20
    assert problems_of(log) == ()


def test_a_draft_models_buffers_are_its_own() -> None:
    log = read(*LOADED, *DRAFT, *READY, TIMING, TIMING)
    assert problems_of(log) == ()
    assert log.buffers(draft=True)[BufferPlace("CUDA0"), BufferKind.MODEL] == 700 * MIB
    assert (log.draft_accepted, log.draft_proposed) == (22, 44)


def without(text: str) -> list[str]:
    return [line for line in LOADED if text not in line]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (without("21002"), "llama-server runs without the worker on attic"),
        (without("CUDA0 "), "NVIDIA GeForce RTX 4090 of iceland got no layers, where 5 were planned"),
        (
            [line.replace("1000.20", "2000.00") for line in LOADED],
            "CPU of attic has 2,000 MiB of weights, where 1,000 MiB were planned",
        ),
        (
            [line.replace("100.00", "150.00") for line in LOADED],
            "CPU of attic has 150 MiB of KV cache, where 100 MiB were planned",
        ),
        (
            [line.replace(" 310.00", "3310.00") for line in LOADED],
            "NVIDIA GeForce RTX 4090 of iceland uses 8,210 MiB in all, where 5,200 MiB were planned",
        ),
        (
            [*LOADED, "0.00.017.212 I llama_kv_cache:        CPU KV buffer size =   100.00 MiB"],
            "layers are on the CPU of iceland: it has 100 MiB of KV cache, where 0 MiB were planned",
        ),
    ],
)
def test_a_half_pool_is_never_healthy(lines: list[str], problem: str) -> None:
    assert problems_of(read(*lines, *READY)) == (problem,)


def test_a_head_without_any_worker_has_every_problem() -> None:
    lines = [line for line in LOADED if "RPC" not in line and "CUDA" not in line]
    problems = problems_of(read(*lines, *READY))
    assert len(problems) == 3


@pytest.mark.parametrize(
    ("line", "code", "message", "node"),
    [
        (
            "0.00.030.535 E Failed to connect to 127.0.0.1:21002",
            "pool-failed", "the head cannot connect to the worker on attic", "attic",
        ),
        (
            "0.00.030.535 E RPC server version mismatch: 3.9.9",
            "pool-versions-differ", "version 3.9.9 of the RPC protocol", None,
        ),
        (
            "/tmp/ggml/src/ggml-rpc/ggml-rpc.cpp:509: Remote RPC server crashed or returned malformed response",
            "pool-failed", "the head lost the connection to a worker", None,
        ),
        (
            "0.00.1.2 E alloc_tensor_range: failed to allocate RPC0[127.0.0.1:21001] buffer of size 4096262144",
            "pool-does-not-fit",
            "device 0 of cellar has not enough free memory: llama-server could not allocate 3,906 MiB",
            "cellar",
        ),
        (
            "alloc_tensor_range: failed to allocate CUDA0 buffer of size 1048576",
            "pool-does-not-fit", "CUDA0 of the head has not enough free memory", None,
        ),
        (
            "0.00.1.2 E llama_model_load: error loading model: unable to allocate CUDA0 buffer",
            "pool-does-not-fit", "CUDA0 of the head has not enough free memory", None,
        ),
        (
            "llama_model_load: error loading model: unknown model architecture: 'gemma9'",
            "pool-model-missing", "does not know models of the kind 'gemma9'", None,
        ),
        (
            "0.0.0.1 E gguf_init_from_file: failed to open GGUF file 'nothere.gguf' (No such file or directory)",
            "pool-model-missing", "failed to open GGUF file 'nothere.gguf' (No such file or directory)", None,
        ),
        (
            "E gguf_init_from_reader: tensor 'blk.3.attn_output.weight' data is not within the file bounds,"
            " model is corrupted or incomplete",
            "pool-model-missing", "the model's file is broken", None,
        ),
        (
            "0.0.0.1 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 51080",
            "pool-failed", "port 51080 on the head's host was taken", None,
        ),
        ("error: invalid argument: --spec-type", "pool-program-missing", "does not know the option --spec-type", None),
        ("CUDA error: illegal address", "pool-failed", "a GPU of the head failed: illegal address", None),
        (
            "0.0.0.1 E llama_model_load: error loading model: done_getting_tensors: wrong number of tensors",
            "pool-model-missing", "cannot load the model: done_getting_tensors: wrong number of tensors", None,
        ),
        (
            "0.0.0.1 E llama_init_from_model: failed to initialize the context: quantized V cache needs flash_attn",
            "pool-model-missing", "with these settings: quantized V cache needs flash_attn", None,
        ),
        (
            "llama-server: error while loading shared libraries: libcudart.so.12: cannot open shared object file",
            "pool-program-missing", "libcudart.so.12", None,
        ),
    ],
)  # fmt: skip
def test_failures_in_clear_words(line: str, code: str, message: str, node: str | None) -> None:
    log = read(
        "0.00.1.2 I srv  load_model: loading model 'a'",
        line,
        "0.0.0.9 E srv  llama_server: exiting due to model loading error",
    )
    assert log.error is not None
    assert log.error.code == code
    assert message in log.error.message
    assert log.error.node == node


def test_a_missing_device_is_an_effect_whose_reason_may_come_later() -> None:
    log = read("error while handling argument: invalid device: RPC1")
    assert log.error is None
    assert log.effect is not None
    assert "does not see the device RPC1" in log.effect.message
    log.feed("E Failed to connect to 127.0.0.1:21001")
    assert log.error is not None
    assert log.error.node == "cellar"


def test_the_first_failure_counts() -> None:
    log = read("E Failed to connect to 127.0.0.1:21001", "E gguf_init_from_file: failed to open GGUF file 'a' (b)")
    assert log.error is not None
    assert log.error.node == "cellar"
    assert log.last_error_line == "gguf_init_from_file: failed to open GGUF file 'a' (b)"


@given(st.text(max_size=200), st.sampled_from(LOADED), st.integers(0, 80))
def test_any_line_is_read(text: str, line: str, place: int) -> None:
    read(text, line[:place] + text + line[place:], "using device " + text, text + " buffer size = " + text)


def test_a_hostile_log_fills_no_memory() -> None:
    log = read(*(f"load_tensors: GPU{number} model buffer size = 1.00 MiB" for number in range(5000)))
    assert len(log.buffers()) < 300
    log = read(*(f"using device D{number} (x) - 1 MiB free" for number in range(5000)))
    assert len(log.devices) < 300
