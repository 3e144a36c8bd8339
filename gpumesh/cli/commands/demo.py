"""`gpumesh demo`: shows what gpumesh does, on simulated GPU hosts that are real processes with real SSH."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.first_report import DEMO_FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.program_name import program_name
from gpumesh.config.extras import need_extra
from gpumesh.errors import ExitCode
from gpumesh.state import Health, MeshState
from gpumesh.text.quoting import shell_word

if TYPE_CHECKING:
    from gpumesh.cli.views.live.demo_display import DemoDisplay
    from gpumesh.daemon.sessions.local_session import LocalSession
    from gpumesh.daemon.sessions.prompt_sender import PromptResult
    from gpumesh.daemon.sessions.session import PromptRequest
    from gpumesh.daemon.shutdown import Shutdown
    from gpumesh.lab.lab import Lab

MODEL = "qwen2.5:7b"
PROMPT_COUNT = 24
PROMPTS_BEFORE_KILL = 6  # so many answers come before a host is killed; by then all hosts are busy
# The least and the most tokens of an answer. Answers are short: a few slow hosts must answer all prompts while a person
# watches.
ANSWER_TOKENS = (16, 48)
RECOVERY_TIMEOUT_S = 12.0
REDRAW_S = 0.25
BUSY_POLL_S = 0.02  # a host answers a prompt in a fraction of a second
# Each command has a line of its own: no line needs more than 80 columns, unless the path of the program does.
NEXT_STEPS = """
What to try next:
  {program} demo --keep
      leaves it running, to play with
  {program} init --from 'ssh root@HOST -p PORT'
      writes a mesh.yaml for your own host
  {program} up -d && {program} run "Hello"
      and that is the whole of it
"""

app = new_app()


@app.command()
def demo(
    ctx: typer.Context,
    nodes: Annotated[int, typer.Option("--nodes", min=2, max=8, help="How many simulated hosts.")] = 3,
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running until Ctrl-C, to play with.")] = False,
) -> None:
    """A whole mesh of simulated GPU hosts on this machine, with nothing to configure.

    Opens tunnels to simulated hosts (their SSH and their sockets are real, their GPUs are not), answers prompts,
    kills a host under load, and shows that nothing was lost. Nothing leaves this machine.
    """
    from gpumesh.daemon.process import async_runner

    try:
        code = async_runner.run(_run_demo(global_options(ctx), nodes, keep))
    except (KeyboardInterrupt, asyncio.CancelledError):  # with --keep the third Ctrl-C raises CancelledError
        raise typer.Exit(130) from None
    if code is not ExitCode.OK:
        raise typer.Exit(int(code))


async def _run_demo(options: GlobalOptions, count: int, keep: bool) -> ExitCode:
    """Starts ``count`` simulated hosts and a mesh over them, and shows the demo. With ``keep`` the mesh then runs until
    Ctrl-C. Returns the exit code of the command."""
    from gpumesh import config
    from gpumesh.daemon.mesh_lock import MeshLock
    from gpumesh.daemon.mesh_process import run_mesh
    from gpumesh.daemon.paths import for_config
    from gpumesh.daemon.shutdown import Shutdown, handle_signals
    from gpumesh.tunnels.local_system.socket_folders import private_folder

    with need_extra("lab", "`gpumesh demo`"):
        from gpumesh.lab import demo_hosts
        from gpumesh.lab.lab import Lab

    hosts = [replace(host, answer_tokens=ANSWER_TOKENS) for host in demo_hosts.make_hosts(count)]
    with private_folder() as folder:
        async with Lab(hosts, folder) as lab:
            file = lab.write_config(folder / "mesh.yaml", listen="127.0.0.1:0", default_model=MODEL)
            paths = for_config(file)
            lock = MeshLock.acquire(paths)
            try:
                stop = Shutdown()
                async with run_mesh(config.load(file), paths, gateway=True, shutdown=stop, lock=lock) as session:
                    code = await _show_demo(session, lab, count)
                    if keep:
                        handle_signals(stop)
                        await _keep_running(session, stop, file, options)
                    else:
                        stop.request(drain_s=1.0)  # all answers are there: nothing has to drain
            finally:
                lock.release()
                paths.log.unlink(missing_ok=True)  # no mesh will have this mesh.yaml again
    if not keep and not options.quiet:
        typer.echo(NEXT_STEPS.rstrip().format(program=program_name()))
    return code


async def _show_demo(session: LocalSession, lab: Lab, count: int) -> ExitCode:
    """Shows the scenes above a table that is redrawn. Returns the exit code of the command."""
    from gpumesh.cli.views.live.demo_display import DemoDisplay

    with DemoDisplay() as display:
        display.print_line(f"{count} simulated GPU hosts; their SSH is real, their GPUs are not.", "bold")
        async with _redraw_while_open(display, session):
            code = await _run_scenes(display, session, lab)
        display.print_table(await session.status())
    return code


@asynccontextmanager
async def _redraw_while_open(display: DemoDisplay, session: LocalSession) -> AsyncGenerator[None]:
    """Redraws the table while the context is open."""
    from gpumesh.event_loop.async_iterators import closing_iterator

    async def draw() -> None:
        async with closing_iterator(session.watch(REDRAW_S)) as states:
            async for state in states:
                display.update_table(state)

    redraw_task = asyncio.create_task(draw(), name="redraw")
    try:
        yield
    finally:
        redraw_task.cancel()
        await asyncio.gather(redraw_task, return_exceptions=True)


async def _run_scenes(display: DemoDisplay, session: LocalSession, lab: Lab) -> ExitCode:
    """Shows the tunnels, one answer, many answers while a host is killed, and the return of that host. Returns the exit
    code of the command."""
    started_at = time.monotonic()
    state = await session.wait_first_report(DEMO_FIRST_REPORT_TIMEOUT_S)
    spent_s = time.monotonic() - started_at
    healthy_names = [node.name for node in state.nodes if node.health is Health.HEALTHY]
    display.print_line(
        f"→ {len(healthy_names)} tunnels are up after {spent_s:.1f} s, and the GPUs behind them are seen."
    )
    display.print_table(state)
    if len(healthy_names) < 2:
        display.print_line("Too few hosts came up on this machine to go on.", "red")
        return ExitCode.NO_NODE
    await _show_one_answer(display, session)
    victim = healthy_names[0]
    display.print_line(
        f"→ Now {PROMPT_COUNT} prompts at once, and after {PROMPTS_BEFORE_KILL} answers {victim} is killed (SIGKILL)."
    )
    results, spent_s = await _send_and_kill(display, session, lab, victim)
    code = _print_results(display, results, spent_s, victim)
    display.print_table(await session.status())
    await lab.host(victim).restart()
    if await _wait_healthy(session, victim):
        display.print_line(f"→ {victim} was started again, and is back in the mesh by itself.")
    else:
        display.print_line(f"→ {victim} was started again; it is still coming back.", "yellow")
    return code


def _make_request(text: str) -> PromptRequest:
    """A request to the demo's model, with the text as the only message."""
    from gpumesh.batches.prompt_lines import PromptEntry
    from gpumesh.daemon.sessions.prompt_requests import make_request
    from gpumesh.daemon.sessions.session import PromptRequest

    return make_request(PromptEntry(text), PromptRequest((), model=MODEL), None)  # None: without a system message


async def _show_one_answer(display: DemoDisplay, session: LocalSession) -> None:
    """Sends one prompt, and prints the node that answered, its speed, and the begin of the answer."""
    from gpumesh.cli.views.figures import shorten
    from gpumesh.daemon.sessions.prompt_sender import send_prompt

    question = "Why is the sky blue?"
    result = await send_prompt(session, _make_request(question), 0, question)  # 0: the number of the only prompt
    rate = "" if result.tokens_per_s is None else f" at {result.tokens_per_s:.0f} tokens/s"
    display.print_line(f"→ gpumesh run {question!r}: {result.tokens} tokens from {result.node}{rate}")
    display.print_line(f"    {shorten((result.response or '').strip(), 100)}", "dim")


async def _send_and_kill(
    display: DemoDisplay, session: LocalSession, lab: Lab, victim: str
) -> tuple[Sequence[PromptResult], float]:
    """Sends all prompts at once, and kills the host ``victim`` when some answers have come and the host works on a
    prompt. Returns the results, then the seconds until the last of them."""
    from gpumesh.daemon.sessions.prompt_sender import send_with_retries

    answer_count = 0
    may_kill = asyncio.Event()

    async def send(index: int) -> PromptResult:
        """Sends one prompt, and lets the host be killed once enough prompts are answered."""
        nonlocal answer_count
        text = f"Tell me something about the number {index}."
        result = await send_with_retries(session, _make_request(text), index, text)
        answer_count += 1
        if answer_count >= PROMPTS_BEFORE_KILL:
            may_kill.set()
        return result

    async def kill_busy_host() -> None:
        """Kills the host at a moment at which it has requests, so that these must move to other hosts."""
        await may_kill.wait()
        async for state in session.watch(interval_s=BUSY_POLL_S):
            host_is_busy = state.node(victim).load.in_flight > 0
            all_answered = answer_count >= PROMPT_COUNT  # then the host will not become busy any more
            if host_is_busy or all_answered:
                break
        await lab.host(victim).kill()
        display.print_line(f"✗ {victim} is dead, with {PROMPT_COUNT - answer_count} prompts still to answer.", "red")

    started_at = time.monotonic()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(index)) for index in range(PROMPT_COUNT)]
        group.create_task(kill_busy_host())
    return [task.result() for task in tasks], time.monotonic() - started_at


def _print_results(display: DemoDisplay, results: Sequence[PromptResult], spent_s: float, victim: str) -> ExitCode:
    """Prints how many prompts were answered, and by which hosts. Returns the exit code of the command: FAILED if a
    prompt was lost."""
    # An empty answer counts as lost, too.
    lost_results = [result for result in results if result.error is not None or not result.response]
    if lost_results:
        first_error = lost_results[0].error
        display.print_line(f"→ {len(lost_results)} of {len(results)} prompts were lost: {first_error}", "bold red")
        return ExitCode.FAILED
    moved_count = sum(result.attempts > 1 for result in results)
    answers_by_host = Counter(result.node or "?" for result in results)
    shares = ", ".join(f"{host} {count}" for host, count in sorted(answers_by_host.items()))
    display.print_line(
        f"→ {len(results)} of {len(results)} answered in {spent_s:.1f} s, 0 lost,"
        f" {moved_count} moved away from {victim} ({shares}).",
        "bold green",
    )
    return ExitCode.OK


async def _wait_healthy(session: LocalSession, name: str) -> bool:
    """Returns True as soon as the node is healthy, and False after RECOVERY_TIMEOUT_S."""
    from gpumesh.event_loop.async_iterators import closing_iterator

    try:
        async with asyncio.timeout(RECOVERY_TIMEOUT_S), closing_iterator(session.watch(interval_s=0.1)) as states:
            async for state in states:
                if state.node(name).health is Health.HEALTHY:
                    return True
    except TimeoutError:  # the caller says that the host is still coming back
        pass
    return False


async def _keep_running(session: LocalSession, stop: Shutdown, file: Path, options: GlobalOptions) -> None:
    """Shows the mesh until Ctrl-C, for ``--keep``, with the commands that a person may try. ``file``: its mesh.yaml."""
    from gpumesh.cli.foreground_mesh import show_mesh

    state: MeshState = await session.status()
    notes = (
        "",
        "It stays up until Ctrl-C. In another terminal:",
        f"  export GPUMESH_CONFIG={shell_word(str(file))}",
        f"  {program_name()} status -w",
        f"  {program_name()} run 'Hello'",
        f"  OLLAMA_HOST={shell_word(state.gateway.url or '')} ollama run {MODEL}",
        "",
    )
    await show_mesh(session, stop, options, notes=notes)
