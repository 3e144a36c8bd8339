from __future__ import annotations

import json
from typing import Any

import pytest

from gpumesh.cli.init.provider_pods import Pod, read_pods
from gpumesh.errors import UsageError

RUNPOD = {
    "id": "xedezhzb9la3ye",
    "name": "my pod",
    "desiredStatus": "RUNNING",
    "publicIp": "213.173.108.12",
    "portMappings": {"22": 17445, "8888": 17446},
}
VAST = {
    "id": 6979233,
    "label": None,
    "actual_status": "running",
    "public_ipaddr": " 142.214.185.187\n",
    "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "20544"}]},
    "ssh_host": "ssh5.vast.ai",
    "ssh_port": 19232,
    "image_runtype": "ssh",
}


def one(document: Any) -> Pod:
    (pod,) = read_pods(json.dumps(document))
    return pod


def test_runpod() -> None:
    assert one(RUNPOD) == Pod("my pod", "RunPod", "213.173.108.12", 17445)
    assert one({**RUNPOD, "portMappings": {"22": "17445"}}).port == 17445


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"publicIp": "", "portMappings": {}}, "it has no address yet (it is RUNNING)"),
        ({"portMappings": None}, "it has no address yet (it is RUNNING)"),
        ({"portMappings": {"8888": 1}}, "it does not expose port 22: add 22 to its TCP ports"),
        ({"publicIp": None, "desiredStatus": None}, "it has no address yet (it is starting)"),
    ],
)
def test_an_unreachable_runpod_pod_has_a_reason(changes: dict[str, Any], why: str) -> None:
    assert one({**RUNPOD, **changes}) == Pod("my pod", "RunPod", unreachable_reason=why)


def test_vast_direct_and_by_its_proxy() -> None:
    assert one(VAST) == Pod("vast-6979233", "vast.ai", "142.214.185.187", 20544)
    odd: list[Any] = [None, [], {}, {"22/tcp": None}, {"22/tcp": [{"HostPort": "?"}]}]
    for ports in odd:
        assert one({**VAST, "ports": ports}) == Pod("vast-6979233", "vast.ai", "ssh5.vast.ai", 19232)
    assert one({**VAST, "ports": None, "image_runtype": "jupyter_direc ssh"}).port == 19233
    assert one({**VAST, "label": "big one"}).name == "big one"


def test_a_vast_instance_that_is_still_loading() -> None:
    pod = one({"id": 1, "actual_status": "loading", "ports": None})
    assert pod == Pod("vast-1", "vast.ai", unreachable_reason="it has no address yet (it is loading)")


@pytest.mark.parametrize("key", ["pods", "instances", "data"])
def test_lists_and_wrapped_lists(key: str) -> None:
    assert len(read_pods(json.dumps({key: [RUNPOD, VAST]}))) == 2
    assert len(read_pods(json.dumps([RUNPOD, VAST]))) == 2
    assert len(read_pods(json.dumps({key: RUNPOD}))) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "no pod"),
        ("[1]", "an object or a list"),
        ('{"a": 1, "\\u001b[31m": 2}', "neither a pod of RunPod nor an instance of vast.ai"),
    ],
)
def test_other_json_is_an_error(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        read_pods(text)
    assert "vastai" in str(caught.value.hint)
