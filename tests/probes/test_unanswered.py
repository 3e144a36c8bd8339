"""What a host waits for, as a finding says it."""

from __future__ import annotations

import pytest

from gpumesh.probes.commands.combined_commands import CommandOutput
from gpumesh.probes.commands.host_commands import CommandsUnfinished, CommandsUnproven, WaitingFor
from gpumesh.probes.unanswered import describe_no_commands, describe_unfinished
from gpumesh.state import Severity

NAME = CommandOutput(0, b"box")


@pytest.mark.parametrize(
    ("waiting_for", "outputs", "code", "severity", "text"),
    [
        (WaitingFor.LOGIN_SHELL, (), "login-shell-slow", Severity.WARNING, "login shell has not started our script"),
        (WaitingFor.EARLIER_COMMANDS, (), "gpu-unknown", Severity.INFO, "another command of ours"),
        (WaitingFor.COMMAND, (), "gpu-unknown", Severity.INFO, "`hostname`"),
        (WaitingFor.COMMAND, (NAME,), "driver-hung", Severity.ERROR, "nvidia-smi did not answer within 10 s"),
        (WaitingFor.COMMAND, (NAME, NAME), "driver-hung", Severity.ERROR, "nvidia-smi did not answer within 10 s"),
        (WaitingFor.COMMAND, None, "driver-hung", Severity.ERROR, "nvidia-smi did not answer within 10 s"),
    ],
)
def test_each_wait_has_its_own_finding(
    waiting_for: WaitingFor, outputs: tuple[CommandOutput, ...] | None, code: str, severity: Severity, text: str
) -> None:
    finding = describe_unfinished(CommandsUnfinished(waiting_for, 12.3, outputs), smi_index=1, timeout_s=5.0, node="a")
    assert (finding.code, finding.severity, finding.node) == (code, severity, "a")
    assert text in finding.message
    assert finding.hint


@pytest.mark.parametrize(
    ("waited_s", "timeout_s", "shown"),
    [(0.3, 0.3, "0.3 s"), (4.9, 5.0, "5 s"), (29.9, 5.0, "10 s"), (65.0, 5.0, "60 s"), (1e9, 5.0, "3600 s")],
)
def test_the_time_is_rounded_so_that_the_message_seldom_changes(waited_s: float, timeout_s: float, shown: str) -> None:
    unfinished = CommandsUnfinished(WaitingFor.LOGIN_SHELL, waited_s, ())
    finding = describe_unfinished(unfinished, smi_index=1, timeout_s=timeout_s, node=None)
    assert finding.message.endswith(f" {shown}")


def test_what_the_account_says_is_quoted_and_printable() -> None:
    finding = describe_no_commands(CommandsUnproven((), b"\033[31mforwarding only\033[0m\n"), "a")
    assert finding.message == "the host runs no commands: to each it says 'forwarding only'"
    assert (finding.code, finding.severity) == ("gpu-unknown", Severity.INFO)
    assert "without a word" in describe_no_commands(CommandsUnproven((), b""), "a").message
