"""Reads the options of `bench simulate`: the fleet file, shares (``a=0.7,b=0.3``), and the workload."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gpumesh.errors import UsageError

if TYPE_CHECKING:
    from gpumesh.bench.simulate.fleet import NodeSpec
    from gpumesh.bench.simulate.report import SimulationResult
    from gpumesh.bench.simulate.workloads import Mix

RESULT_FILE, REPORT_FILE = "simulation.json", "report.html"

T = TypeVar("T")


def read_fleet(path: Path) -> tuple[NodeSpec, ...]:
    """The nodes of a fleet file. Raises UsageError if the file cannot be read, or with all problems in it."""
    from gpumesh.bench.simulate.fleet_file import parse_fleet
    from gpumesh.config.mesh_file.reader import read_text

    return parse_fleet(read_text(path, str(path)), file=str(path))


def parse_mix(option: str, text: str, parse: Callable[[str], T], *, example: str = "a=0.7,b=0.3") -> Mix[T]:
    """Reads values with shares, as ``a=0.7,b=0.3``; a value alone has the share 1. ``parse`` reads one value. Raises
    UsageError with the name of the option; its hint is the ``example``."""
    from gpumesh.bench.simulate.workloads import Mix

    values: list[T] = []
    shares: list[float] = []
    for part in text.split(","):
        name, share_text = part.strip(), "1"
        if "=" in part:  # the last "=", as the name of a model may contain one
            name, _, share_text = part.strip().rpartition("=")
        try:
            value, share = parse(name), float(share_text)
        except ValueError:
            raise UsageError(
                f"{option} {text!r}: {part.strip()!r} cannot be read", hint=f"e.g. {option} {example}"
            ) from None
        if not name or not 0 < share < math.inf:
            raise UsageError(f"{option} {text!r}: {part.strip()!r} is no value with a share above 0")
        values.append(value)
        shares.append(share)
    return Mix(tuple(values), tuple(shares))


def models_mix(text: str | None, nodes: Sequence[NodeSpec]) -> Mix[str]:
    """The models of the workload; without the option the fleet's first model. Raises UsageError for a model that no
    node has."""
    from gpumesh.text.model_names import full_name

    known = list(dict.fromkeys(model for node in nodes for model in node.models))
    if text is None:
        return parse_mix("--mix", known[0], full_name)
    mix = parse_mix("--mix", text, full_name)
    for model in mix.values:
        if model not in known:
            raise UsageError(f"--mix: no node of the fleet has the model {model!r}", hint=f"it has {', '.join(known)}")
    return mix


def parse_context(text: str) -> int | None:
    """A context length in tokens; ``None`` for the word `default`. Raises ValueError for any other text."""
    if text == "default":
        return None
    tokens = int(text)
    if tokens < 1:
        raise ValueError("a context has at least one token")
    return tokens


def check_effect(given: Collection[str], *, has_trace: bool, batch: int) -> None:
    """Raises UsageError if an option has no effect beside the others. ``given``: the names of the parameters that stand
    on the command line, as ``think_s``."""
    if "load" in given and "speed" in given:
        raise UsageError("--load and --speed both set the times of the requests", hint="give one of the two")
    if not has_trace:
        return
    without_effect = ["turns", "think_s", "systems", "system_tokens", "sessions"]
    if not batch:  # the lengths are those of the batch requests
        without_effect += ["prompt_tokens", "tokens", "fixed"]
    options = [f"--{name.replace('_', '-')}" for name in without_effect if name in given]
    if options:
        raise UsageError(
            f"{', '.join(options)}: no effect with --trace, which has its own prompts and answers",
            hint="--poisson RATE sends requests that are made up",
        )


def check_positive(option: str, number: float) -> None:
    """Raises UsageError if the number is not above 0, or not finite."""
    if not 0 < number < math.inf:
        raise UsageError(f"{option} {number:g} is not above 0")


def check_folder(folder: Path, *, force: bool) -> None:
    """Makes the folder for a result if it does not exist. Raises UsageError if it holds a result and ``force`` is not
    given, or if it cannot be made."""
    if (folder / RESULT_FILE).exists() and not force:
        raise UsageError(f"{folder} holds a result already", hint="choose another with --out, or add --force")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {folder}: {error.strerror or error}", hint="choose another with --out") from None


def write_result(folder: Path, result: SimulationResult) -> None:
    """Writes ``simulation.json`` and ``report.html`` to the folder. Raises UsageError when that fails."""
    from gpumesh.bench.simulate.report import simulation_html, simulation_json
    from gpumesh.files import atomic_file

    text = json.dumps(simulation_json(result), indent=1, allow_nan=False) + "\n"
    try:
        atomic_file.replace(folder / REPORT_FILE, simulation_html(result), mode=0o644, sync=False)
        atomic_file.replace(folder / RESULT_FILE, text, mode=0o644, sync=False)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror or error}") from None
