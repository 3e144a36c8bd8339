"""``address_from``: what a user's command may print, and that none of its processes is left."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpumesh.errors import HostUnresolved
from gpumesh.topology import AddressCommand
from gpumesh.tunnels.address_command import ask_address, parse_address
from tests.tunnels.polling import alive, wait_until


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("1.2.3.4 13323\n", "1.2.3.4", 13323),
        ("  1.2.3.4\t13323  \n\n", "1.2.3.4", 13323),
        ("gpu.example:2222", "gpu.example", 2222),
        ("gpu.example", "gpu.example", 22),
        ("[::1]:2222", "::1", 2222),
        ("[fe80::1%eth0]", "fe80::1%eth0", 22),
        ("::1", "::1", 22),
        ("::1 2222", "::1", 2222),
        ("[::1] 2222", "::1", 2222),
        ('{"host": "1.2.3.4", "port": 10341}', "1.2.3.4", 10341),
        ('{"host": "1.2.3.4", "port": "10341", "more": [1]}', "1.2.3.4", 10341),
        ('{"host": "1.2.3.4"}', "1.2.3.4", 22),
    ],
)
def test_forms_of_an_address(text: str, host: str, port: int) -> None:
    assert parse_address(text, default_port=22) == (host, port)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing"),
        ("\n", "nothing"),
        ("1.2.3.4 none", "'none' is not a port"),
        ("1.2.3.4:", "is not a port"),
        ("1.2.3.4:http", "'http' is not a port"),
        ("1.2.3.4 0", "port 0"),
        ("1.2.3.4 65536", "port 65536"),
        ("1.2.3.4 22 33", "3 words"),
        ("-oProxyCommand=evil", "not a host"),
        ("-oProxyCommand=evil 22", "not a host"),
        ("a;rm -rf", "is not a port"),
        ("$(id)", "not a host"),
        ("gpu\x1b[31m.example", "not a host"),
        ("{", "cannot be read"),
        ("[" * 9, "not a host"),
        ('{"port": 22}', "no `host` yet"),
        ('{"host": "", "port": 22}', "no `host` yet"),
        ('{"host": null}', "no `host` yet"),
        ('{"host": "h", "port": null}', "no `port` yet"),
        ('{"host": "h", "port": true}', "no `port` yet"),
        ('{"host": "h", "port": 22.5}', "no `port` yet"),
        ('{"host": "h", "port": -1}', "port -1"),
        ("{" + '"a":{' * 100_000, "cannot be read"),
        ("No instances found. Log in at https://example.com first", "words"),
        ("x" * 10_000, "not a host"),
    ],
)
def test_text_without_an_address_raises_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        parse_address(text, default_port=22)
    assert len(str(caught.value)) < 160


@given(st.text(), st.integers(1, 65535))
@example("\u0661.\u0662 \u0662\u0662", 22)  # digits, but not ASCII digits
def test_a_parsed_host_is_always_safe_as_an_argument(text: str, default: int) -> None:
    try:
        host, port = parse_address(text, default_port=default)
    except ValueError:
        return
    assert host.isascii()
    assert host.isprintable()
    assert not host.startswith("-")
    assert not set(host) & set(" ;|&$`'\"\\<>()[]{}*?!#~\n")
    assert 1 <= port <= 65535


def command(script: str, *, timeout_s: float = 20.0) -> AddressCommand:
    return AddressCommand(("sh", "-c", script), timeout_s)


async def ask_default(command_spec: AddressCommand) -> tuple[str, int]:
    return await ask_address(command_spec, default_port=2222, node="pod")


async def test_a_command_is_run() -> None:
    assert await ask_default(command("echo 1.2.3.4; echo progress >&2")) == ("1.2.3.4", 2222)
    python = AddressCommand((sys.executable, "-c", 'print(\'{"host": "h", "port": 5}\')'))
    assert await ask_default(python) == ("h", 5)


@pytest.mark.parametrize(
    ("command_spec", "message"),
    [
        (command("exit 3"), "exit status 3"),
        (command("echo 1.2.3.4; exit 1"), "exit status 1"),
        (command("kill -9 $$"), "exit status -9"),
        (command("cat"), "printed nothing"),  # its input is empty
        (command("sleep 600", timeout_s=0.2), "within 0.2 s"),
        (command("head -c 300000 /dev/zero | tr '\\0' x"), "not a host"),
        (AddressCommand(("gpumesh-no-such-command",)), "cannot run"),
        (AddressCommand(("/",)), "cannot run"),
        (AddressCommand(("sh", "-c", "a\0b")), "NUL"),
    ],
)
async def test_a_command_without_an_address_raises_an_error_that_is_retried(
    command_spec: AddressCommand, message: str
) -> None:
    with pytest.raises(HostUnresolved) as caught:
        await ask_default(command_spec)
    assert message in caught.value.message
    assert "address_from" in caught.value.message
    assert caught.value.node == "pod"
    assert not caught.value.needs_person
    assert "by hand" in (caught.value.hint or "")


@pytest.mark.parametrize("cancelled", [False, True])
async def test_the_command_and_its_children_are_ended(tmp_path: Path, cancelled: bool) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 600 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait"
    asking = asyncio.create_task(ask_default(command(script, timeout_s=60.0 if cancelled else 1.0)))
    await wait_until(pids.exists, "the command's start")
    started = [int(pid) for pid in pids.read_text().split()]
    assert all(alive(pid) for pid in started)
    if cancelled:
        asking.cancel()
    with pytest.raises((HostUnresolved, asyncio.CancelledError)):
        await asking
    await wait_until(lambda: not any(alive(pid) for pid in started), f"the end of {started}")


async def test_what_the_command_prints_on_stderr_is_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_API_KEY", "planted-pod-key")  # no other test looks for it in processes
    noise = "for i in $(seq 3000); do echo noise >&2; done"
    for script, timeout_s in (("exit 3", 20.0), ("sleep 60", 1.0), ("echo a b c", 20.0)):
        told = "printf '\\033[1mpod %s is stopped\\n' $POD_API_KEY >&2"
        with pytest.raises(HostUnresolved) as caught:
            await ask_default(command(f"{noise}; {told}; {script}", timeout_s=timeout_s))
        assert "pod ******** is stopped" in caught.value.message
        assert caught.value.message.isprintable()
        assert "planted" not in caught.value.message


async def test_an_address_does_not_wait_for_a_process_that_holds_stderr_open() -> None:
    started_at = time.monotonic()
    assert await ask_default(command("sleep 60 >/dev/null & echo 10.0.0.9 2200")) == ("10.0.0.9", 2200)
    assert time.monotonic() - started_at < 15
