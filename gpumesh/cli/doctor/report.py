"""Gathers the report of `gpumesh doctor`: what somebody who helps needs to know of an installation. Holds no secret.

Each function returns the lines of one section, as names and values. None of them raises an error because of what it
finds: that is what the report is for.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpumesh import __version__
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.views.logs.selection import LogLevel, LogSelection
from gpumesh.errors import ConfigError, GPUMeshError

DISTRIBUTION = "gpumesh-cli"
SSH_TIMEOUT_S = 5.0  # for ``ssh -V``, which takes some milliseconds
STATUS_TIMEOUT_S = 2.0  # for a running mesh to tell its state
SHOWN_LOG_LINES = 10
SHOWN_PROBLEMS = 20

Section = Mapping[str, object]
"""The lines of a section: by name a text, a number, or a list of texts."""


def make_report(options: GlobalOptions) -> dict[str, Any]:
    """The sections by name, without secrets, and with ``~`` for the home folder."""
    sections: dict[str, Callable[[GlobalOptions], Section]] = {
        "gpumesh": _describe_program,
        "system": _describe_system,
        "libraries": _list_libraries,
        "paths": _list_paths,
        "configuration": _check_configuration,  # before what could show a secret: it learns the names of the variables
        "mesh": _look_for_mesh,
        "redis": _ask_redis,
        "limits": _list_limits,
        "log": _read_log,
    }
    report: dict[str, Any] = {}
    for name, make_section in sections.items():
        try:
            report[name] = make_section(options)
        except (GPUMeshError, OSError) as error:  # for example a folder that cannot be made
            report[name] = {"error": str(error)}
        if not report[name]:
            del report[name]  # a section that this mesh does not need
    masked_report: dict[str, Any] = _mask(report)
    return masked_report


def _mask(value: Any) -> Any:
    """The value without secrets and without the path of the home folder in all its texts."""
    from gpumesh.config import environment
    from gpumesh.config.credentials import mask_secrets

    if isinstance(value, str):
        with suppress(GPUMeshError):  # no home folder
            value = re.sub(re.escape(str(environment.home())) + r"(?=[/\s:,]|$)", "~", value)
        return mask_secrets(value)
    if isinstance(value, Mapping):
        return {name: _mask(member) for name, member in value.items()}
    return [_mask(member) for member in value] if isinstance(value, list) else value


def _describe_program(_options: GlobalOptions) -> Section:
    import gpumesh

    return {
        "version": __version__,
        "program": shutil.which("gpumesh") or f"not on PATH; started as {sys.argv[0]}",
        "package": str(Path(gpumesh.__file__).parent),
        "python": f"{platform.python_version()} at {sys.executable}",
    }


def _describe_system(_options: GlobalOptions) -> Section:
    from gpumesh.config import environment

    size = shutil.get_terminal_size()
    return {
        "system": platform.platform(),
        "openssh": _openssh_version(),
        "encoding": str(sys.stdout.encoding),
        "terminal": f"{environment.get('TERM') or 'none'}, {size.columns} x {size.lines}",
        "shell": environment.shell() or "unknown",
    }


def _openssh_version() -> str:
    """What `ssh -V` prints, or why it cannot be run."""
    from gpumesh.config import environment

    try:
        done = subprocess.run(
            ["ssh", "-V"],
            capture_output=True,
            text=True,
            timeout=SSH_TIMEOUT_S,
            check=False,
            env=environment.child_environment(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return "there is no ssh that can be run (transport openssh and `gpumesh ssh` need it)"
    return (done.stderr or done.stdout).strip()


def _list_libraries(_options: GlobalOptions) -> Section:
    """The installed versions of the packages that gpumesh asks for."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {"error": f"{DISTRIBUTION} is not installed as a package"}
    names = [re.split(r"[^A-Za-z0-9._-]", text)[0] for text in requirements if "extra ==" not in text]
    versions: dict[str, object] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _list_paths(options: GlobalOptions) -> Section:
    """Where files are looked for, and where this user's files of the mesh are."""
    from gpumesh import config
    from gpumesh.config import environment

    section: dict[str, object] = {
        "looked_for": [str(path) for path in config.search_paths(options.config)],
        "runtime": str(environment.runtime_dir()),
        "state": str(environment.state_dir()),
    }
    with suppress(GPUMeshError):  # there is no mesh.yaml: the section "configuration" tells why
        paths = options.paths()
        section |= {"socket": str(paths.socket), "log": str(paths.log), "access_log": str(paths.access_log)}
    return section


def _check_configuration(options: GlobalOptions) -> Section:
    """The file, whether it is valid, and what `config check` has to say."""
    from gpumesh import config
    from gpumesh.config.credentials import is_secret_set

    path = options.config_file()
    section: dict[str, object] = {"file": str(path)}
    try:
        topology = options.topology()
    except ConfigError as error:
        return {**section, "valid": "no", "problems": [str(problem) for problem in error.problems[:SHOWN_PROBLEMS]]}
    kinds = Counter("direct" if node.ssh is None else node.ssh.transport.value for node in topology.nodes)
    findings = [f"{finding.severity}: {finding.node or topology.name}: {finding.message}"
                for finding in config.check(topology)]  # fmt: skip
    variables = [f"{name} {'is set' if is_secret_set(name) else 'is not set'}" for name in topology.secret_variables]
    return {
        **section,
        "valid": "yes",
        "nodes": f"{len(topology.nodes)}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        "secrets": sorted(variables),
        "findings": findings,
    }


def _look_for_mesh(options: GlobalOptions) -> Section:
    """Whether the mesh of this configuration runs and answers, and which others of this user run."""
    from gpumesh.config import environment
    from gpumesh.daemon.control_socket.quick_status import fetch_status
    from gpumesh.daemon.mesh_lock import LockWatch
    from gpumesh.daemon.paths import MeshPaths

    section: dict[str, object] = {}
    own_folder = None
    with suppress(GPUMeshError):  # without a mesh.yaml there can still be other meshes
        paths = options.paths()
        own_folder = paths.folder
        watch = LockWatch.open(paths)
        if watch is None:
            section["state"] = "does not run"
        else:
            with watch:
                is_held, pid = watch.held, watch.pid
            if is_held:
                section["state"] = f"runs, pid {pid}"
                section["control_socket"] = "does not answer"
                status = fetch_status(paths.socket, timeout_s=STATUS_TIMEOUT_S)
                if status is not None:
                    section["control_socket"] = "answers"
                    section["gateway"] = str(status["gateway"]["url"] or "none")
                    section["nodes_up"] = f"{status['totals']['nodes_up']} of {status['totals']['nodes']}"
            else:
                section["state"] = "was killed; `gpumesh down` removes what it left"
    others = []
    for runtime in environment.runtime_dirs():
        for folder in sorted(runtime.glob("*/")):
            other = MeshPaths(config=folder, folder=folder, log=folder)
            other_watch = None if folder == own_folder else LockWatch.open(other)
            if other_watch is not None:
                with other_watch:
                    others += [f"pid {other_watch.pid} in {folder}"] if other_watch.held else []
    return {**section, "other_meshes": others}


def _ask_redis(options: GlobalOptions) -> Section:
    """Whether gateways can share the mesh over the Redis of mesh.yaml; empty if it names none."""
    import asyncio

    from gpumesh.config.extras import need_extra

    try:
        topology = options.topology()
    except GPUMeshError:  # the section "configuration" tells why
        return {}
    if topology.redis is None:
        return {}
    url = {"url": topology.redis.url}
    try:
        with need_extra("redis", "`redis:` in mesh.yaml"):
            from gpumesh.coordination.redis_check import check_redis
        answer = asyncio.run(check_redis(topology.redis, topology.name))
    except GPUMeshError as error:
        return {**url, "error": error.message}
    return {
        **url,
        "server": answer.server,
        "answers_in": f"{answer.answer_ms:g} ms",
        "gateways": answer.gateways,
        "problems": list(answer.problems),
    }


def _list_limits(_options: GlobalOptions) -> Section:
    limits = {"open_files": resource.RLIMIT_NOFILE, "processes": getattr(resource, "RLIMIT_NPROC", None)}
    section: dict[str, object] = {
        name: " of ".join(map(_format_limit, resource.getrlimit(number)))
        for name, number in limits.items()
        if number is not None
    }
    return {**section, "processors": str(os.cpu_count() or "unknown")}


def _format_limit(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _read_log(options: GlobalOptions) -> Section:
    """The last lines of the log that are at least warnings, and the errors of a start that failed."""
    from gpumesh.cli.views.logs.lines import format_log_line

    paths = options.paths()
    selection = LogSelection(level=LogLevel.WARNING)
    lines: deque[str] = deque(maxlen=SHOWN_LOG_LINES)
    with suppress(FileNotFoundError), paths.log.open(encoding="utf-8", errors="replace") as file:
        lines.extend(filter(selection.takes, file))
    section: dict[str, object] = {"last_warnings": [format_log_line(line) for line in lines]}
    with suppress(FileNotFoundError):
        start_errors = paths.stderr_log.read_text("utf-8", "replace").strip().splitlines()
        if start_errors:
            section["failed_start"] = start_errors[-SHOWN_LOG_LINES:]
    return section
