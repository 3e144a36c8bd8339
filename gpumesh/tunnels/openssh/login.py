"""Starts an ``ssh`` master and logs in: with a session that echoes, or without a session if the host refuses that."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

from gpumesh.errors import ConnectTimeout, TunnelError
from gpumesh.topology import SshSpec
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.openssh.errors import NO_SESSION_PATTERN, NO_TERMINAL_TEXT, TOO_MANY_TRIES_TEXT
from gpumesh.tunnels.openssh.fixed_options import read_unknown_options
from gpumesh.tunnels.openssh.master import MasterState, OpensshMaster
from gpumesh.tunnels.openssh.options import format_destination, master_command
from gpumesh.tunnels.openssh.prompts import AskpassServer
from gpumesh.tunnels.openssh.ssh_output import SshOutput
from gpumesh.tunnels.transport import ConnectRequest

SSH_FAILED = 255
"""ssh's exit status when ssh itself failed. A command may end with the same status."""

FIRST_ECHO_TIMEOUT_S = 3.0  # the time for the first echo after the login
MIN_ECHO_TIMEOUT_S = 0.5  # the time for the first echo when the login has used up all its time


async def log_in(setup: ConnectRequest, folder: Path, prompts: AskpassServer, deadline: Deadline) -> OpensshMaster:
    """Returns a master that is logged in, with a session if the host gives one. Raises ``TunnelError``.

    The control sockets in ``folder`` have short names, which socket_folders.py knows: ``c`` with a session, ``n``
    without.
    """
    unknown = await read_unknown_options()
    start = partial(_start_and_log_in, setup, prompts=prompts, deadline=deadline, unknown=unknown)
    destination = format_destination(setup.ssh)
    has_session = not setup.without_session
    control = folder / ("c" if has_session else "n")
    named_keys_only = False
    master = await start(control, session=has_session)
    if master.exited and had_too_many_keys(master.output.log) and setup.ssh.agent:
        await master.close()
        # Other keys of the agent used up all tries. The keys and the password that mesh.yaml names come now.
        named_keys_only = True
        prompts.forget_given_secrets()
        master = await start(control, session=has_session, named_keys_only=True)
    if not master.exited:
        return master
    await master.close()
    if not has_session or not was_only_session_refused(master.output, master.process.returncode):
        raise master.output.make_error(destination)
    # That ssh had logged in, so a second ssh, without a session, needs the same secrets again.
    prompts.forget_given_secrets()
    master = await start(folder / "n", session=False, named_keys_only=named_keys_only)
    if not master.exited:
        return master
    await master.close()
    raise master.output.make_error(destination)


def had_too_many_keys(log_lines: Iterable[str]) -> bool:
    """Whether the host ended the login after too many tries (sshd's MaxAuthTries): each key that ssh offers is one."""
    return any(TOO_MANY_TRIES_TEXT in line for line in log_lines)


def was_only_session_refused(output: SshOutput, returncode: int | None) -> bool:
    """Whether an ssh that has ended was logged in, and failed only because the host gave it no session, or ended it.

    Then an ssh without a session may work. Three things show it: ssh printed that the host gave no session; its exit
    status is not ``SSH_FAILED``; or it has reported no failure after the login. In the last two cases the host ran
    another command instead of ours, which may end with any status or by a signal.
    """
    if any(NO_TERMINAL_TEXT in line for line in output.log):
        return False  # such a host carries no tunnel, with or without a session
    host_gave_no_session = any(NO_SESSION_PATTERN.search(line) for line in output.log)
    ended_without_failure = output.logged_in and not output.failed_after_login
    return host_gave_no_session or ended_without_failure or returncode != SSH_FAILED


async def _start_and_log_in(
    setup: ConnectRequest,
    control: Path,
    *,
    prompts: AskpassServer,
    deadline: Deadline,
    unknown: Collection[str],
    session: bool,
    named_keys_only: bool = False,
) -> OpensshMaster:
    """Starts one ssh, and returns a master that is logged in or that has ended (``exited``).

    ``options.master_command`` explains ``unknown``, ``session`` and ``named_keys_only``. Raises ``TunnelError``, after
    it has closed the master.
    """
    command = master_command(
        setup,
        control,
        batch=not prompts.can_answer,
        session=session,
        unknown=unknown,
        named_keys_only=named_keys_only,
    )
    askpass = prompts.askpass_path if prompts.can_answer else None
    master = await OpensshMaster.start(command, control, askpass)
    try:
        logged_in = await master.wait_logged_in(deadline, session=session)
        if logged_in and master.state is MasterState.SILENT:
            # A session without an echo is accepted too: the login shell may be slow, or a forced command never echoes.
            timeout_s = min(FIRST_ECHO_TIMEOUT_S, max(MIN_ECHO_TIMEOUT_S, deadline.remaining_s))
            await master.measure_round_trip_ms(timeout_s)
    except TimeoutError as error:
        await master.close()
        raise timeout_error(master, setup.ssh, setup.ssh.connect_timeout_s) from error
    except BaseException:
        await master.close()
        raise
    return master


def timeout_error(master: OpensshMaster, ssh: SshSpec, timeout_s: float) -> TunnelError:
    """The error for an ssh that took longer than ``timeout_s``: the cause that ssh printed, if it
    printed one; else ConnectTimeout."""
    printed_error = master.output.make_timeout_error(format_destination(ssh), ssh.user, timeout_s)
    if printed_error is not None:
        return printed_error
    return ConnectTimeout(
        f"no connection to {format_destination(ssh)} within {timeout_s:g} s",
        hint="the host is off or hung, or a firewall drops the connection",
    )
