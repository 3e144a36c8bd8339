"""Every parser that reads what a host, a client or another program says, in process: bytes in, nothing out.

Each raises what it documents and nothing else, and takes time and memory in proportion to what it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from gpumesh.audit.identity import store_fingerprint
from gpumesh.backends import safe_json
from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.dialects import DIALECTS, find_counters
from gpumesh.balancer.prefixes import PromptHasher
from gpumesh.coordination.facts import messages as fact_messages
from gpumesh.coordination.step_messages import decode_mail, decode_message, decode_reply
from gpumesh.daemon.control_socket import messages
from gpumesh.errors import BackendError, ProbeError, StreamCut
from gpumesh.event_loop.slice_queue import SLICE_BYTES
from gpumesh.gateway import merged_lists
from gpumesh.gateway.body_parsers.json_members import read_small_members, scan_members
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.parser import Refusal, RequestEnd, RequestHead, RequestParser
from gpumesh.gateway.model_requests import MODEL_ROUTES, read_demand, read_model
from gpumesh.gateway.prompt_reading import PromptReader
from gpumesh.mesh.models.merged_progress import MergedProgress
from gpumesh.mesh.models.store_answers import StoreRefusal, parse_step
from gpumesh.probes.commands.combined_commands import split_script_output
from gpumesh.probes.disk_space import read_free_mib
from gpumesh.probes.nvidia_smi import probe_gpus
from gpumesh.probes.smi_tables import read_gpus, read_processes
from gpumesh.text.printable import printable
from gpumesh.topology import BackendKind
from gpumesh.tunnels.address_command import parse_address
from gpumesh.tunnels.base import ExecResult
from gpumesh.tunnels.openssh import errors as openssh_errors
from gpumesh.tunnels.workers import protocol
from gpumesh.wire import status_from_json
from tests.fuzz.cases import SLICE, Case
from tests.fuzz.cpu_speed import measure_slowdown
from tests.fuzz.memory import peak_mib
from tests.probes.command_routes import run_directly

T = TypeVar("T")

# CPU time, because other processes use the machine too. Most parsers run in the gateway's event loop, where a slow one
# delays the streams.
CPU_S, CPU_S_PER_MIB = 0.15, 0.5
# What a document of empty lists needs as Python's objects, and once more what is made of it.
MEMORY_MIB, MEMORY_PER_BYTE = 32.0, 100.0


@dataclass(frozen=True, slots=True)
class FuzzTarget:
    """``feed`` takes the bytes in the pieces in which they came. ``raises``: what it documents."""

    feed: Callable[[Sequence[bytes]], object]
    seeds: tuple[bytes, ...]
    raises: tuple[type[Exception], ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    cpu_s: float
    memory_mib: float


def _whole(function: Callable[[bytes], object]) -> Callable[[Sequence[bytes]], object]:
    return lambda pieces: function(b"".join(pieces))


def _text(function: Callable[[str], object]) -> Callable[[Sequence[bytes]], object]:
    return lambda pieces: function(b"".join(pieces).decode("utf-8", "replace"))


# -- probes ----------------------------------------------------------------------------------------------------------

_GPU = (
    b"0, GPU-8f1c1a2e-1111-2222-3333-444455556666, 00000000:01:00.0, NVIDIA GeForce RTX 4090, 550.54.15, 24564, 5632,"
    b" 18932, 3, 1, 41, 62.50, 450.00, 210, 30, P8, Enabled, 0x0000000000000001\n"
)
_OLD = b"0, GPU-8f1c1a2e, 00000000:01:00.0, Tesla K80, 470.57.02, 11441, 0, 11441, 0, 35\n"
_PROCESS = b"GPU-8f1c1a2e-1111-2222-3333-444455556666, 4242, /usr/bin/ollama, 5120\n"
_SMI_OUTPUTS = (
    b"af4a84245990\n@gpumesh@ 0\n" + _GPU + b"@gpumesh@ 0\n" + _PROCESS + b"@gpumesh@ 0\n",
    b"box\n@gpumesh@ 0\nsh: 1: nvidia-smi: not found\n@gpumesh@ 127\nsh: 1: nvidia-smi: not found\n@gpumesh@ 127\n",
    b"box\n@gpumesh@ 0\nNVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n@gpumesh@ 9\n",
    b'box\n@gpumesh@ 0\nField "fan.speed" is not a valid field to query.\n@gpumesh@ 2\n' + _OLD + b"@gpumesh@ 0\n",
    b"box\n@gpumesh@ 0\nUnable to determine the device handle for GPU 0000:01:00.0: GPU is lost.\n@gpumesh@ 15\n",
)


def _probe_gpus(pieces: Sequence[bytes]) -> None:
    output = b"".join(pieces)

    async def said(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        return ExecResult(0, output, b"")

    asyncio.run(probe_gpus(run_directly(said), timeout_s=10.0, node="fuzzed"))


def _df(rows: bytes) -> bytes:
    return b"Filesystem 1024-blocks Used Available Capacity Mounted on\n" + rows


# -- inference servers -----------------------------------------------------------------------------------------------

VERSION = b'{"version":"0.12.6"}'
TAGS = (
    b'{"models":[{"name":"qwen2.5:7b","model":"qwen2.5:7b","modified_at":"2026-01-01T00:00:00.123456789+02:00","size":468,'
    b'"digest":"845dbda0ea48ed749caafd9e6037047aa19acfcfd82e704d7ca97d631a0b697e","details":{"parent_model":"","format":'
    b'"gguf","family":"qwen2","families":["qwen2"],"parameter_size":"7.6B","quantization_level":"Q4_K_M"}}]}'
)
PS = (
    b'{"models":[{"name":"qwen2.5:7b","model":"qwen2.5:7b","size":6654289920,"digest":"845d","details":{"family":"qwen2"},'
    b'"expires_at":"2026-01-01T00:05:00.1234+00:00","size_vram":6654289920,"context_length":4096}]}'
)
MODELS = b'{"object":"list","data":[{"id":"qwen2.5:7b","object":"model","created":1767225600,"owned_by":"library"}]}'
_PROPS = (
    b'{"default_generation_settings":{"n_ctx":4096},"total_slots":4,"model_path":"/m.gguf","build_info":"b6000-abc"}'
)
_LLAMA = (
    b'{"object":"list","data":[{"id":"m.gguf","owned_by":"llamacpp","meta":{"n_ctx_train":32768,"size":4683073184}}]}'
)


def _inventory(kind: BackendKind, name: str) -> Callable[[Sequence[bytes]], object]:
    good = {"version": VERSION, "tags": TAGS, "ps": PS, "models": _LLAMA, "props": _PROPS, "health": b'{"status":"ok"}'}

    def feed(pieces: Sequence[bytes]) -> None:
        body = b"".join(pieces)
        for status in (200, 404, 500, 503):
            answers = {key: (200, good[key]) for key in DIALECTS[kind].probe_calls() if key in good}
            try:
                store_fingerprint(DIALECTS[kind].read_inventory({**answers, name: (status, body)}).catalog)
            except ProbeError as error:
                assert printable(error.message, 1000) == error.message
            DIALECTS[kind].error_text(status, body)

    return feed


_NATIVE = (
    b'{"model":"m","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"Hel"},"done":false}\n'
    b'{"model":"m","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"lo","thinking":"hm"},'
    b'"done":false}\n{"model":"m","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop",'
    b'"total_duration":5000000,"load_duration":1,"prompt_eval_count":8,"prompt_eval_duration":1,"eval_count":2,'
    b'"eval_duration":1000000}\n'
)
_GENERATE = (
    b'{"model":"m","response":"Hel","done":false}\n{"model":"m","response":"lo","done":true,"context":[1,2,3]}\n'
)
_EVENTS = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":"Hel"}'
    b',"finish_reason":null}]}\n\ndata: {"id":"c","choices":[{"index":0,"delta":{"content":"lo"},"finish_reason":'
    b'"stop"}]}\n\ndata: {"id":"c","choices":[],"usage":{"prompt_tokens":8,"completion_tokens":2,"total_tokens":10},'
    b'"timings":{"predicted_n":2,"predicted_ms":1.5}}\n\ndata: [DONE]\n\n'
)
_WHOLE_CHAT = (
    b'{"choices":[{"message":{"role":"assistant","content":"Hello"},"finish_reason":"stop"}],'
    b'"usage":{"total_tokens":9}}'
)
_COMPLETION = b'data: {"id":"c","choices":[{"index":0,"text":"Hel","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
_RESPONSES = (
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"Hel"}\n\n'
    b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":{"output_tokens":2}}}\n\n'
)
_MESSAGES = (
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":8}}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Hel"}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
_ERRORS = (b'{"error":"llama runner process has terminated"}\n', b'error: {"message":"slot unavailable"}\n\n')
STREAMS = {
    "/api/chat": (_NATIVE, _ERRORS[0]),
    "/api/generate": (_GENERATE,),
    "/v1/chat/completions": (_EVENTS, _ERRORS[1]),
    "/v1/completions": (_COMPLETION,),
    "/v1/responses": (_RESPONSES,),
    "/v1/messages": (_MESSAGES,),
}
REQUESTS = (
    b'{"model":"hostile:1b","messages":[{"role":"user","content":"hi"}],"options":{"num_ctx":4096,"num_predict":5}}',
    b'{"model":"hostile:1b","prompt":"hi","stream":false,"keep_alive":"5m","format":{"type":"object"},"images":["aGk="]}',
)


def _reader(kind: BackendKind, *, stream: bool) -> Callable[[Sequence[bytes]], object]:
    def feed(pieces: Sequence[bytes]) -> None:
        reader = DIALECTS[kind].create_reader(stream=stream)
        for piece in pieces:
            reader.feed(piece)
        reader.close()

    return feed


def _continuation(path: str) -> Callable[[Sequence[bytes]], object]:
    """As an answer's first upstream, and again as the one that goes on after a cut."""

    def feed(pieces: Sequence[bytes]) -> None:
        clock = itertools.count()
        answer = Continuation(
            path, REQUESTS["generate" in path or path == "/v1/completions"], clock=lambda: float(next(clock))
        )
        for _ in range(2):
            for piece in pieces:
                answer.feed(piece)
            answer.finish_body()
            if answer.finished or answer.handle_cut() is not None:
                break
            while answer.next_question("other", BackendKind.OLLAMA) is not None:
                answer.apply_reply(200, b"".join(pieces))
            answer.next_call("other", BackendKind.OLLAMA)
        assert isinstance(answer.text, str)

    return feed


def _progress(pieces: Sequence[bytes]) -> None:
    progress = MergedProgress(["a", "b"])
    for line in b"".join(pieces).split(b"\n")[:2000]:
        with contextlib.suppress(StoreRefusal):
            step = parse_step(line, "a")
            if step is not None:
                progress.add_step("a", step)
                safe_json.dump_compact({"steps": [repr(step) for step in progress.take_steps()]})


def _merged(pieces: Sequence[bytes]) -> None:
    """What comes out is JSON that a strict reader takes, whatever one node says; the other's is in it."""
    body = b"".join(pieces)
    for function, good, key in (
        (merged_lists.merge_tags, TAGS, "models"),
        (merged_lists.merge_loaded, PS, "models"),
        (merged_lists.merge_openai_models, MODELS, "data"),
    ):
        document = json.loads(function([body, good]), parse_constant=_no_constant)
        names = {entry.get("name", entry.get("id")) for entry in document[key]}
        assert "qwen2.5:7b" in names, f"the other node's model is not in {key}"


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


# -- ssh -------------------------------------------------------------------------------------------------------------

_SSH_ERRORS = (
    b"kex_exchange_identification: Connection closed by remote host\r\nConnection closed by 10.0.0.1 port 22\r\n",
    b"root@10.0.0.1: Permission denied (publickey,password).\r\n",
    b"@@@@@@\r\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\r\n@@@@@@\r\nHost key verification failed.\r\n",
    b"channel 3: open failed: administratively prohibited: open failed\r\n",
    b"Bad packet length 1349676916.\r\nssh_dispatch_run_fatal: message authentication code incorrect\r\n",
)


def _ssh_errors(pieces: Sequence[bytes]) -> None:
    """As via_openssh does: its last lines, made printable."""
    lines = [printable(line) for line in b"".join(pieces).split(b"\n")[-40:]]
    for was_up in (False, True):
        openssh_errors.error_from_stderr(lines, "10.0.0.1:22", was_up=was_up)
    openssh_errors.NO_SESSION_PATTERN.search("\n".join(lines))


# -- requests, other processes ---------------------------------------------------------------------------------------


def _request(pieces: Sequence[bytes]) -> None:
    body = b"".join(pieces)
    members = read_small_members(body) or _result_of(scan_members(body))
    for path in ("/api/chat", "/v1/chat/completions", "/v1/messages"):
        route = MODEL_ROUTES[path]
        read_demand(route, {}, members, size=len(body), model=read_model(route, members))
        _result_of(_PROMPTS.scan_prompt(route, members, "m"))
    _PROMPTS.read_session({}, members)


_PROMPTS = PromptReader(PromptHasher(b"secret of a test"))


_OFFER = b"POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
_CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n"
_HTTP_REQUESTS = (
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\n" + _CHUNKS,
    _OFFER + b"Content-Length: 5\r\n\r\nhelloHEAD / HTTP/1.0\r\n\r\n",
    _OFFER + _CHUNKS,
)


def _http_requests(pieces: Sequence[bytes]) -> None:
    """In slices, as a connection gives them to the parser. Nothing but a head follows the end of a request."""
    parser = RequestParser(Bounds().max_head_bytes)
    in_body = False
    for piece in pieces:
        for at in range(0, len(piece), SLICE_BYTES):
            for event in parser.feed(piece[at : at + SLICE_BYTES]):
                assert isinstance(event, bytes | RequestEnd if in_body else RequestHead | Refusal)
                in_body = isinstance(event, RequestHead | bytes)
    parser.close()


def _result_of(work: Generator[None, None, T]) -> T:
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def _status(pieces: Sequence[bytes]) -> None:
    document = safe_json.parse_object(b"".join(pieces))
    if document is not None:
        status_from_json(document)


_STEP_REPLIES = (
    msgspec.msgpack.encode({"is_known": False}),
    msgspec.msgpack.encode(
        {
            "is_known": True,
            "keys": [[0, 1, True, [True, False], [2]]],
            "mail": [[1, "share", "GPU-1", 0, 0]],
            "gateways": ["other"],
            "facts_version": 3,
            "facts": [["other", "topic", "text"]],
        }
    ),
)

_STATUS = (
    b'{"schema":"gpumesh.status/1","mesh":"home","at":"2026-11-24T04:10:00Z","gateway":{"url":null,"state":"serving",'
    b'"in_flight":0,"queued":0},"totals":{"nodes":1,"nodes_up":1,"gpus":0,"vram_total_mib":null,"vram_used_mib":null,'
    b'"vram_free_mib":null,"tokens_per_s":0.0},"nodes":[],"findings":[]}'
)


TARGETS: dict[str, FuzzTarget] = {
    "gpus": FuzzTarget(_whole(read_gpus), (_GPU, _GPU + _GPU.replace(b"0, GPU-8", b"1, GPU-9"))),
    "gpu-processes": FuzzTarget(_whole(read_processes), (_PROCESS, _PROCESS * 3)),
    "remote-script": FuzzTarget(_whole(lambda data: split_script_output(data, 3)), _SMI_OUTPUTS),
    "nvidia-smi": FuzzTarget(_probe_gpus, _SMI_OUTPUTS),
    "disk": FuzzTarget(_whole(read_free_mib), (_df(b"/dev/sda1 1000 400 600 40% /\n"), _df(b""))),
    "ollama-version": FuzzTarget(_inventory(BackendKind.OLLAMA, "version"), (VERSION,)),
    "ollama-tags": FuzzTarget(_inventory(BackendKind.OLLAMA, "tags"), (TAGS,)),
    "ollama-ps": FuzzTarget(_inventory(BackendKind.OLLAMA, "ps"), (PS,)),
    "openai-models": FuzzTarget(_inventory(BackendKind.OPENAI, "models"), (MODELS, _LLAMA)),
    "openai-props": FuzzTarget(_inventory(BackendKind.OPENAI, "props"), (_PROPS,)),
    "ollama-stream": FuzzTarget(
        _reader(BackendKind.OLLAMA, stream=True),
        (_NATIVE, _GENERATE, _ERRORS[0]),
        (BackendError, ProbeError, StreamCut),
    ),
    "openai-stream": FuzzTarget(
        _reader(BackendKind.OPENAI, stream=True), (_EVENTS, _ERRORS[1]), (BackendError, ProbeError, StreamCut)
    ),
    "openai-whole": FuzzTarget(
        _reader(BackendKind.OPENAI, stream=False), (_WHOLE_CHAT,), (BackendError, ProbeError, StreamCut)
    ),
    **{f"continued:{path}": FuzzTarget(_continuation(path), seeds) for path, seeds in STREAMS.items()},
    "counters": FuzzTarget(_whole(find_counters), (_NATIVE, _EVENTS, _WHOLE_CHAT)),
    "progress": FuzzTarget(
        _progress,
        (
            b'{"status":"pulling manifest"}\n{"status":"pulling 845d","digest":"845d","total":100,"completed":5}\n'
            b'{"status":"success"}\n',
        ),
    ),
    "merged": FuzzTarget(_merged, (TAGS, PS, MODELS)),
    "ssh-errors": FuzzTarget(_ssh_errors, _SSH_ERRORS),
    "address": FuzzTarget(
        _text(lambda text: parse_address(text, default_port=22)),
        (b"10.0.0.1 13323\n", b"[2001:db8::1]:22", b'{"host":"pod.example","port":"22"}'),
        (ValueError,),
    ),
    "request-body": FuzzTarget(_request, REQUESTS, (BadRequest,)),
    "http-request": FuzzTarget(_http_requests, _HTTP_REQUESTS),
    "redis-step": FuzzTarget(_whole(decode_reply), _STEP_REPLIES, (ValueError,)),
    "redis-mail": FuzzTarget(
        _whole(decode_mail), (msgspec.msgpack.encode([1, [2, "grant", "GPU-1", 0, 3]]),), (ValueError,)
    ),
    "redis-message": FuzzTarget(
        _whole(decode_message), (msgspec.msgpack.encode(["gateway", "topic", "text"]),), (ValueError,)
    ),
    "control-request": FuzzTarget(
        _whole(messages.decode_request),
        (b'{"kind":"Exec","node":"a","argv":["nvidia-smi"]}\n', b'{"kind":"Down","drain_s":5.0}\n'),
        (ValueError, RecursionError),
    ),
    "control-reply": FuzzTarget(
        _whole(messages.decode_reply),
        (
            b'{"kind":"Error","code":"queue-full","message":"m","hint":null,"node":null,"exit_code":1,"detail":{"a":1}}\n',
            b'{"kind":"Piece","chunk":{"text":"a","thinking":"","done":false,"done_reason":null,"counters":null}}\n',
        ),
        (ValueError, RecursionError),
    ),
    "worker-message": FuzzTarget(
        _whole(protocol.decode_message),
        (b'{"kind":"OutputPiece","id":1,"stream":"stdout","data":"aGk="}\n', b'{"kind":"Pong","id":1,"rtt_ms":2.0}\n'),
        (ValueError,),
    ),
    "gateway-fact": FuzzTarget(
        _text(fact_messages.decode),
        (
            b'{"type":"presence","host":"h","pid":1,"version":"1","since":1.5,"in_flight":1,"queued":0,"drained":[]}',
            b'{"type":"question","servers":{"0123456789abcdef0123456789abcdef":1.0}}',
            b'{"type":"prompts","prompt_secret":"0123456789abcdef0123456789abcdef","prompts":[]}',
        ),
        (ValueError,),
    ),
    "status": FuzzTarget(_status, (_STATUS,), (ValueError,)),
}


def run(case: Case) -> Cost:
    """Feeds it. Raises what the parser must not raise, and AssertionError for what it must not cost."""
    target = TARGETS[case.target]
    pieces = case.writes()
    if not any(part.apart for part in case.parts):
        pieces = [b"".join(pieces)] if case.size <= SLICE else pieces
    before_mib = peak_mib(reset=True)
    began = time.process_time()
    try:
        target.feed(pieces)
    except target.raises as error:
        assert len(str(error)) < 2000, f"an error of {len(str(error))} characters"
    cost = Cost(time.process_time() - began, peak_mib() - before_mib)
    limit_s = CPU_S + CPU_S_PER_MIB * case.size / (1 << 20)
    if cost.cpu_s > limit_s:
        limit_s *= measure_slowdown()
    limit_mib = MEMORY_MIB + MEMORY_PER_BYTE * case.size / (1 << 20)
    assert cost.cpu_s <= limit_s, f"{cost.cpu_s:.2f} s of CPU time for {case.size} bytes ({limit_s:.2f} are allowed)"
    assert cost.memory_mib <= limit_mib, (
        f"{cost.memory_mib:.0f} MiB for {case.size} bytes ({limit_mib:.0f} are allowed)"
    )
    return cost
