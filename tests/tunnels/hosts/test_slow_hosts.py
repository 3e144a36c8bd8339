"""What a host is waiting for is told apart, and nothing piles up on it: slow login shells, hung programs, ended
sessions. Each by both transports."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh.probes.commands.host_commands import KILL_AFTER_S
from gpumesh.probes.nvidia_smi import Answer, GpuReport
from gpumesh.topology import TransportKind
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.hosts.visit import Host, Visit, running, visiting
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd
from tests.tunnels.supervised import BACKOFF, UP, both

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    needs("sshd", "ssh", "nss-wrapper"),
    both,
    pytest.mark.asyncio(loop_scope="module"),
]

# Each start of the login shell leaves a line. ``{wait}`` is what is slow.
COUNTING_SHELL = 'echo "$BASH_EXECUTION_STRING" >>~/shells; {wait}\n'


def codes(report: GpuReport) -> list[str]:
    return [finding.code for finding in report.findings]


def is_complete(report: GpuReport) -> bool:
    return report.answer is Answer.COMPLETE


async def wait_pings(visit: Visit, count: int) -> None:
    """Waits for ``count`` further round trips, each of which the tunnel announces."""
    states = visit.watched.states
    known = len(states)
    await wait_until(lambda: len(states) >= known + count, f"{count} pings")


async def test_a_slow_login_shell_is_no_hung_driver_and_is_started_once(
    tmp_path: Path, runtime: Path, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    """One shell for the transport's own session, one for all probes."""
    host = Host("slow", files={".bashrc": COUNTING_SHELL.format(wait="sleep 2")}, timeout_s=0.2)
    async with (
        running(host, tmp_path) as (account, server),
        visiting(host, server, pool, backend, transport) as visit,
    ):
        report = await visit.probe()
        assert codes(report) == ["login-shell-slow"]
        assert "has not started our script" in (report.error or "")
        report = await visit.probe_until(is_complete)
        assert (codes(report), len(report.gpus)) == ([], 1)
        for _ in range(3):
            await visit.probe_until(is_complete)
        assert account.lines("shells") == 2
        assert visit.watched.tunnel.state.reconnects == 0


async def test_a_login_shell_that_never_ends_takes_two_sessions_and_no_tunnel(
    tmp_path: Path, runtime: Path, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    """It reads its input, so nothing may be written to it, and no ping may wait for it."""
    host = Host("endless", files={".bashrc": COUNTING_SHELL.format(wait="cat >>~/read")}, timeout_s=0.2)
    async with (
        running(host, tmp_path) as (account, server),
        visiting(host, server, pool, backend, transport) as visit,
    ):
        for _ in range(3):
            assert codes(await visit.probe()) == ["login-shell-slow"]
            await wait_pings(visit, 2)
        assert account.lines("shells") == 2
        assert visit.watched.phases[-1] is UP
        assert BACKOFF not in visit.watched.phases
        read = (account.home / "read").read_text()
        assert "nvidia-smi" not in read


async def test_a_hung_nvidia_smi_is_started_once_and_can_be_killed(
    tmp_path: Path, runtime: Path, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    host = Host("hung", smi='test -e "$HOME/well" && exit 6; echo $$ >>"$HOME/pids"; exec sleep 600', timeout_s=0.3)
    async with (
        running(host, tmp_path) as (account, server),
        visiting(host, server, pool, backend, transport) as visit,
    ):
        await visit.probe_until(lambda report: account.starts == 1)
        for _ in range(3):
            report = await visit.probe()
            assert (report.answer, codes(report)) == (Answer.UNFINISHED, ["driver-hung"])
            assert report.hostname, "the host has told its name before"
        assert account.starts == 1
        visit.skipped_s = KILL_AFTER_S
        assert codes(await visit.probe()) == ["driver-hung"]
        pid = int((account.home / "pids").read_text())
        await wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the killed nvidia-smi")
        (account.home / "well").touch()
        report = await visit.probe_until(lambda report: codes(report) == ["gpu-missing"])
        assert account.starts == 2


async def test_a_slow_nvidia_smi_answers_in_the_end(
    tmp_path: Path, runtime: Path, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    host = Host("slow driver", smi="sleep 1.2; exit 6", timeout_s=0.4)
    async with (
        running(host, tmp_path) as (account, server),
        visiting(host, server, pool, backend, transport) as visit,
    ):
        await visit.probe_until(lambda report: codes(report) == ["driver-hung"])
        report = await visit.probe_until(is_complete)
        assert (codes(report), account.starts) == (["gpu-missing"], 1)
        assert (report.took_s or 0.0) > 1.0


async def test_a_host_that_cannot_find_its_own_name_has_no_hung_driver(
    tmp_path: Path, runtime: Path, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    files = {"bin/hostname": "#!/bin/sh\nexec sleep 600\n", ".bashrc": "chmod +x ~/bin/hostname\n"}
    host = Host("nameless", files=files, timeout_s=0.5)
    async with (
        running(host, tmp_path) as (account, server),
        visiting(host, server, pool, backend, transport) as visit,
    ):
        report = await visit.probe_until(lambda report: "hostname" in (report.error or ""))
        assert codes(report) == ["gpu-unknown"]
        assert account.starts == 0


async def test_an_ended_session_is_opened_again(
    tmp_path: Path, runtime: Path, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    """As sshd's ChannelTimeout ends it."""
    host = Host("idle", files={".bashrc": COUNTING_SHELL.format(wait='echo $$ >>~/"pids"')})
    async with (
        running(host, tmp_path) as (account, server),
        visiting(host, server, pool, backend, transport) as visit,
    ):
        assert is_complete(await visit.probe())
        (pid,) = _shells_of_probes(account.home)
        (account.home / "kill").write_text("")
        await visit.run("kill", "-TERM", str(pid))
        assert is_complete(await visit.probe_until(is_complete))
        assert len(_shells_of_probes(account.home)) == 2
        assert visit.watched.tunnel.state.reconnects == 0


def _shells_of_probes(home: Path) -> list[int]:
    """The pids of the shells that were started for probes, by what each login shell left."""
    commands, pids = (home / "shells").read_text().splitlines(), (home / "pids").read_text().splitlines()
    return [int(pid) for command, pid in zip(commands, pids, strict=True) if "read -r c" in command]


async def test_an_account_that_ends_our_session_late_costs_one_reconnect_at_most(
    tmp_path: Path, runtime: Path, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    """Later than transport openssh waits for its first echo: that ssh counts as connected, and ends with its session.
    No probe has the time to run all commands."""
    forced = 'case $SSH_ORIGINAL_COMMAND in "exec cat") sleep 3.5;; *) sleep 0.5;; esac; echo no; exit 1'
    host = Host("late", options={"ForceCommand": forced}, timeout_s=0.9)
    async with (
        running(host, tmp_path) as (_account, server),
        visiting(host, server, pool, backend, transport) as visit,
    ):
        if transport is TransportKind.OPENSSH:
            await wait_until(lambda: visit.watched.tunnel.state.reconnects == 1, "the reconnect")
            assert visit.watched.tunnel.state.last_error
        reconnects = visit.watched.tunnel.state.reconnects
        seen: list[list[str]] = []
        for _ in range(20):
            report = await visit.probe()
            seen.append(codes(report))
            if report.answer is Answer.NO_COMMANDS:
                break
        assert seen[-1] == ["gpu-unknown"]
        assert all(codes == ["login-shell-slow"] for codes in seen[:-1]), "and nvidia-smi is not blamed"
        await wait_pings(visit, 3)
        assert visit.watched.tunnel.state.reconnects == reconnects


@pytest.mark.parametrize("command", ["yes no", "yes no >&2"])
async def test_a_host_that_writes_without_end_runs_no_commands_and_is_not_read_without_end(
    tmp_path: Path, runtime: Path, pool: WorkerPool, backend: int, transport: TransportKind, command: str
) -> None:
    host = Host("endless", options={"ForceCommand": f"exec {command}"}, timeout_s=5.0)
    async with (
        running(host, tmp_path) as (_account, server),
        visiting(host, server, pool, backend, transport) as visit,
    ):
        assert isinstance(server, Sshd)
        for _ in range(2):
            report = await visit.probe()
            assert (report.answer, codes(report)) == (Answer.NO_COMMANDS, ["gpu-unknown"])
        await wait_pings(visit, 3)
        written = [_read_written_bytes(pid) for pid in server.children()]
        assert sum(written) < 40 << 20
        assert visit.watched.tunnel.state.reconnects == 0


def _read_written_bytes(pid: int) -> int:
    """The bytes that ``yes`` has written; 0 for another process."""
    try:
        if Path(f"/proc/{pid}/comm").read_text().strip() != "yes":
            return 0
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])
