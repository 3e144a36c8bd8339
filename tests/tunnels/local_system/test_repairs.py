"""Which files can mend which failure, and when a change of them is reported."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gpumesh.topology import SshSpec, TransportKind
from gpumesh.tunnels.local_system.repairs import POLL_S, RepairWatch, list_repair_files

KNOWN, KEY, SYSTEM = Path("/k/known_hosts"), Path("/k/id"), Path("/etc/ssh/ssh_known_hosts")


@pytest.mark.parametrize(
    ("code", "by_sshtunnel", "by_openssh"),
    [
        ("host-key-unknown", (KNOWN,), (KNOWN, SYSTEM)),
        ("host-key-changed", (KNOWN,), (KNOWN, SYSTEM)),
        ("host-key-revoked", (KNOWN,), (KNOWN, SYSTEM)),
        ("key-unreadable", (KEY,), (KEY,)),
        ("auth-refused", (KEY,), (KEY,)),
        ("transport-unsupported", (), (Path("/h/.ssh/config"),)),
        ("secret-missing", (), ()),
        ("forwarding-forbidden", (), ()),
        ("connect-refused", (), ()),
    ],
)
def test_only_files_that_have_to_do_with_the_failure_count(
    code: str, by_sshtunnel: tuple[Path, ...], by_openssh: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a new line in known_hosts would cost a login with a key that the host has refused."""
    monkeypatch.setenv("HOME", "/h")
    ssh = SshSpec("h", known_hosts=KNOWN, identity_files=(KEY,))
    assert list_repair_files(ssh, code) == by_sshtunnel
    openssh = SshSpec("h", known_hosts=KNOWN, identity_files=(KEY,), transport=TransportKind.OPENSSH)
    assert list_repair_files(openssh, code) == by_openssh


class Polls:
    """Takes the place of ``asyncio.sleep``: acts before the given polls (from 1), and ends the watch after the last."""

    def __init__(self, **actions: Callable[[], object]) -> None:
        self._actions = {int(name.removeprefix("at_")): action for name, action in actions.items()}
        self.count = 0

    async def sleep(self, delay_s: float) -> None:
        assert delay_s == POLL_S
        self.count += 1
        if self.count > 9:
            raise TimeoutError
        self._actions.get(self.count, lambda: None)()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "id"
    file.write_text("key")
    return file


async def polls_until_report(watch: RepairWatch, code: str, **actions: Callable[[], object]) -> int | None:
    """The number of the poll at which the change was reported; ``None``: not until the ninth."""
    polls, reports = Polls(**actions), []
    try:
        await watch.watch(code, lambda: reports.append(polls.count), sleep=polls.sleep)
    except TimeoutError:
        assert reports == []
        return None
    (poll,) = reports
    return poll


async def test_each_kind_of_change_is_reported(tmp_path: Path, key: Path) -> None:
    known = tmp_path / "known_hosts"
    watch = RepairWatch(SshSpec("h", known_hosts=known, identity_files=(key,)))
    watch.note_attempt()
    assert (
        await polls_until_report(watch, "auth-refused", at_3=lambda: known.write_text("h ssh-ed25519 AAAA\n")) is None
    )
    assert await polls_until_report(watch, "host-key-unknown") == 1, "since the attempt began, there is a file"
    for change in (
        lambda: key.write_text("another key"),
        lambda: key.chmod(0o600),
        lambda: os.replace(known, key),
        key.unlink,
        lambda: key.write_text("key"),
    ):
        watch.note_attempt()
        assert await polls_until_report(watch, "key-unreadable", at_3=change) == 3
    watch.note_attempt()
    assert await polls_until_report(watch, "key-unreadable", at_3=key.read_text) is None


async def test_a_change_during_the_attempt_is_not_lost(key: Path) -> None:
    """The attempt may have read the file before the change."""
    watch = RepairWatch(SshSpec("h", identity_files=(key,)))
    watch.note_attempt()
    key.write_text("another key")
    assert await polls_until_report(watch, "key-unreadable") == 1


async def test_where_no_file_can_help_nothing_is_polled(key: Path) -> None:
    watch = RepairWatch(SshSpec("h", identity_files=(key,)))
    polls = Polls()
    await watch.watch("forwarding-forbidden", lambda: pytest.fail("reported"), sleep=polls.sleep)
    assert polls.count == 0
