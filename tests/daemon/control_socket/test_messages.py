from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from gpumesh.backends.base import Chunk, Message, ServerCounters
from gpumesh.balancer.base import Priority
from gpumesh.config.comparison import ConfigSnapshot, Differences, KeyChange, NamedChange
from gpumesh.config.live_changes import LeavingNode, ReloadReport
from gpumesh.daemon.control_socket import messages
from gpumesh.daemon.control_socket.messages import ControlReply, ControlRequest
from gpumesh.daemon.sessions.session import PromptRequest
from gpumesh.errors import (
    ConfigError,
    ExitCode,
    GPUMeshError,
    ModelMissing,
    NoNodeError,
    Problem,
    QueueFull,
    StreamCut,
    UsageError,
)
from gpumesh.mesh.history import History, HistorySeries
from gpumesh.mesh.outages.outage import Outage, OutageKind
from gpumesh.pool_spec import KvType, PoolMember, PoolSpec
from gpumesh.pools.base import (
    DeviceOffer,
    DeviceShare,
    MemberPlan,
    MemberState,
    PathKind,
    PoolPhase,
    PoolPlan,
    PoolState,
    SpeedForecast,
    WorkerPath,
)
from gpumesh.topology import BackendSpec, NodeSpec, SshSpec, Topology
from tests.cli.states import typical
from tests.daemon.scripted import SHAPE

ASK = PromptRequest(
    (Message("system", "s"), Message("user", "ü\n\ud800", ("QUJD",))),
    model="m",
    node="n",
    priority=Priority.BATCH,
    options={"stop": ["#"], "temperature": 0.5},
    think="high",
    timeout_s=3.0,
)
POOL = PoolSpec("big", "llama3.3:70b", (PoolMember("a"), PoolMember("b", 8192)), "a", split=(60, 20), draft="d.gguf")
PATH = WorkerPath(PathKind.HEAD_TO_WORKER, 0.4)
SHARE = DeviceShare(DeviceOffer("NVIDIA GeForce RTX 4090", 0, 24 << 30, 20 << 30), 0, 60, 30, 20, 10, 70)
FORECAST = SpeedForecast(14.0, 4, 40.0, 20.0, 50.0, 30.0, 0.7)
PLAN = PoolPlan(
    "big",
    "llama3.3:70b",
    SHAPE,
    (MemberPlan("a", is_head=True, shares=(SHARE,)), MemberPlan("b", is_head=False, shares=(), path=PATH)),
    context=4096,
    parallel=4,
    kv_type=KvType.Q8_0,
    problems=("2 GiB too big",),
    advice=("a context of 2048 fits",),
    speed=FORECAST,
)
STATE = PoolState(
    *("big", "llama3.3:70b", PoolPhase.LOADING, datetime(2026, 11, 30, tzinfo=UTC)),
    members=(MemberState("b", False, 20, 1 << 30, 1 << 29, PATH),),
    predicted=FORECAST,
)
REQUESTS: list[ControlRequest] = [
    messages.GetStatus(),
    messages.GetHistory(),
    messages.GetConfiguration(),
    messages.Watch(0.5),
    messages.FirstReport(9.0),
    messages.Chat(ASK),
    messages.Exec("n", ("sh", "-c", "echo")),
    messages.Drain("n"),
    messages.Resume("n"),
    messages.Hold("n", Outage(OutageKind.SERVER, "stop it", "start it")),
    messages.Reconnect("n"),
    messages.Reload(),
    messages.PlanPool(POOL),
    messages.StartPool("big"),
    messages.StopPool("big"),
    messages.GetPools(),
    messages.Down(10.0),
]
REPLIES: list[ControlReply] = [
    messages.State(typical()),
    messages.Past(History(gpus=(HistorySeries("GPU-1", (None, 5.5)),))),
    messages.Configuration(ConfigSnapshot(Topology("home", (NodeSpec("a", BackendSpec(), SshSpec("h")),)), "abc")),
    messages.Reloaded(
        ReloadReport(
            Differences(("b",), ("c",), (NamedChange("a", (KeyChange("weight", "1", "2"),)),), models_added=("m",)),
            after_restart=(KeyChange("gateway.listen", "127.0.0.1:1"),),
            reopened=("a",),
            leaving=(LeavingNode("c", 2),),
        )
    ),
    messages.Held(),
    messages.Route("n", 2),
    messages.Piece(Chunk(text="x", done=True, counters=ServerCounters(tokens=2, eval_ms=20.0))),
    messages.Output("stdout", "QUJD", ended=True, exit_status=7),
    messages.PlannedPool(PLAN),
    messages.PoolStates((STATE,)),
    messages.End(),
    messages.Error("usage", "m", "h", "n", 2, {"a": 1}),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda message: type(message).__name__)
def test_requests_survive_encoding_in_one_line(request_: ControlRequest) -> None:
    line = messages.encode_message(request_)
    assert line.count(b"\n") == 1
    assert messages.decode_request(line) == request_


@pytest.mark.parametrize("reply", REPLIES, ids=lambda message: type(message).__name__)
def test_replies_survive_encoding_in_one_line(reply: ControlReply) -> None:
    line = messages.encode_message(reply)
    assert line.count(b"\n") == 1
    assert messages.decode_reply(line) == reply


def test_every_kind_of_message_is_tested() -> None:
    assert {type(message).__name__ for message in REQUESTS} == set(messages._REQUESTS)
    assert {type(message).__name__ for message in REPLIES} == set(messages._REPLIES)


def test_an_unknown_field_is_ignored_and_an_unknown_kind_is_an_error() -> None:
    document = {**json.loads(messages.encode_message(messages.Drain("n"))), "gently": True}
    assert messages.decode_request(json.dumps(document).encode()) == messages.Drain("n")
    for line in (b'{"kind": "Dance"}', b'{"kind": "End"}', b"5", b"{}", b'{"kind": []}', b'{"kind": "Drain"}', b"x"):
        with pytest.raises(ValueError, match=r".") as caught:
            messages.decode_request(line)
        assert str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        GPUMeshError("m", hint="h", node="n"),
        UsageError("m", hint="h"),
        NoNodeError("m", hint="h"),
        ModelMissing("m", available=("a", "b"), hint="h"),
        QueueFull("m", retry_after_s=2.5),
        StreamCut("m", hint="h", node="n"),
        ConfigError((Problem("m", "f", 3, 4, "nodes[0].ssh"), Problem("n", "f")), hint="h"),
    ],
)
def test_an_error_keeps_its_code_hint_and_detail(error: GPUMeshError) -> None:
    message = messages.decode_reply(messages.encode_message(messages.message_from_error(error)))
    assert isinstance(message, messages.Error)
    back = messages.error_from_message(message)
    assert (back.message, back.hint, back.node) == (error.message, error.hint, error.node)
    assert (back.code, back.exit_code) == (error.code, error.exit_code)
    if isinstance(error, (QueueFull, ModelMissing, StreamCut, ConfigError)):
        assert type(back) is type(error)
    if isinstance(error, ConfigError) and isinstance(back, ConfigError):
        assert back.problems == error.problems
    if isinstance(error, QueueFull) and isinstance(back, QueueFull):
        assert back.retry_after_s == error.retry_after_s
    if isinstance(error, ModelMissing) and isinstance(back, ModelMissing):
        assert back.available == error.available


def test_an_error_with_odd_details_is_still_an_error() -> None:
    odd = messages.Error("queue-full", "m", exit_code=77, detail={"retry_after_s": "soon"})
    back = messages.error_from_message(odd)
    assert (type(back), back.exit_code) == (messages.RemoteError, ExitCode.FAILED)
    odd = messages.Error("config", "m", exit_code=2, detail={"problems": [{"line": "one"}]})
    assert type(messages.error_from_message(odd)) is messages.RemoteError
