"""Makes the finding on a host that has not answered a probe of its GPUs, or that runs no commands. Pure."""

from __future__ import annotations

from gpumesh.probes.commands.host_commands import CommandsUnfinished, CommandsUnproven, WaitingFor
from gpumesh.state import Finding, Severity
from gpumesh.text.printable import printable

# The waiting times that a message names, so that it does not change with each probe.
_STEPS_S = (5, 10, 30, 60, 300, 600, 1800, 3600)


def describe_unfinished(
    unfinished: CommandsUnfinished, *, smi_index: int, timeout_s: float, node: str | None
) -> Finding:
    """The finding that says what the host waits for. ``smi_index`` is the index of the first nvidia-smi among the
    commands: those before it belong to our own script. ``timeout_s`` is the time-out of the probe."""
    duration = _format_duration(max(unfinished.waited_s, timeout_s))
    match unfinished.waiting_for:
        case WaitingFor.LOGIN_SHELL:
            message = f"the account's login shell has not started our script within {duration}"
            hint = (
                "time `ssh HOST true`: a slow ~/.bashrc (conda, pyenv, a home folder on a network disk), one that reads"
                " its input or starts another shell, or a forced command; the server works without, only its GPUs are"
                " not known yet"
            )
            return Finding("login-shell-slow", Severity.WARNING, node, message, hint)
        case WaitingFor.EARLIER_COMMANDS:
            message = f"another command of ours has run on the host for {duration}"
            hint = "it is killed after a minute; is a network disk away? try `df` on the host"
            return Finding("gpu-unknown", Severity.INFO, node, message, hint)
        case WaitingFor.COMMAND:
            outputs = unfinished.outputs
            if outputs is not None and len(outputs) < smi_index:
                message = f"the host has not run `hostname` within {duration}, and nvidia-smi comes after it"
                return Finding("gpu-unknown", Severity.INFO, node, message, "try `hostname` on the host")
            message = f"nvidia-smi did not answer within {duration}"
            hint = (
                "a hung driver needs a reboot: see `dmesg | grep -i nvrm`; a slow first call is cured by"
                " `nvidia-smi -pm 1`"
            )
            return Finding("driver-hung", Severity.ERROR, node, message, hint)


def describe_no_commands(unproven: CommandsUnproven, node: str | None) -> Finding:
    """The finding on a host that runs none of our commands: its account is for forwarding only."""
    text = printable(unproven.text, 200)
    shown_text = f"to each it says {text!r}" if text else "it ends each session without a word"
    message = f"the host runs no commands: {shown_text}"
    hint = "check the account's login shell there, or a forced command in its authorized_keys; the server works without"
    return Finding("gpu-unknown", Severity.INFO, node, message, hint)


def _format_duration(duration_s: float) -> str:
    """The duration, rounded down to one of ``_STEPS_S`` if it is longer than the first of them."""
    reached = [step_s for step_s in _STEPS_S if duration_s >= step_s]
    return f"{reached[-1] if reached else duration_s:g} s"
