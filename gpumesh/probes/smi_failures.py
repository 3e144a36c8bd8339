"""Finds out from exit status and output why nvidia-smi failed: each failure has its own cause and its own remedy. Pure.

Exit statuses and texts are from NVIDIA's man page and from captures (docs/internals/nvidia-smi.md). The text is tested
before the status, because wrappers and containers change the status, and one status stands for several failures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpumesh.probes.commands.combined_commands import CommandOutput
from gpumesh.state import Severity
from gpumesh.text.printable import printable

# Exit statuses; 126 and 127 are the shell's.
OK = 0
NO_DEVICES = 6
NO_DRIVER = 9
INFOROM = 14  # a GPU's infoROM is corrupted: nvidia-smi prints the table all the same, and a warning after it
GPU_LOST = 15
MISMATCH = 18
NOT_EXECUTABLE, NOT_FOUND = 126, 127

# Of shells, which name the program first; the last one is Windows' "not recognized". nvidia-smi itself also says of
# other files that they are not there.
_NOT_FOUND = re.compile(r"nvidia-smi\W.{0,60}(not found|no such file|not recog)")
# Of the loader of programs, of a kernel, and of shells: nvidia-smi is there, and what it needs is not.
_CANNOT_START = re.compile(r"error while loading shared libraries|error loading shared library|required file not found")
_WRONG_MACHINE_TEXT = "exec format error"
_LOST_TEXTS = ("unable to determine the device handle", "gpu is lost", "gpu has fallen off the bus")
# Texts that mean a failure even if the status is 0. Under WSL and in wrapper scripts every call ends with status 0.
_NO_DEVICES_TEXT = "no devices were found"  # at the beginning
_FAILURE_TEXTS = ("nvidia-smi has failed", "failed to initialize nvml", *_LOST_TEXTS)

# What nvidia-smi itself advises, after the cause.
_ADVICE = re.compile(r"\s*\b(Make sure that the latest NVIDIA driver|Reboot the system to recover)[^.]*\.?")


@dataclass(frozen=True, slots=True)
class SmiFailure:
    """Why nvidia-smi failed, as a finding says it. ``affects_whole_host``: the host's driver has failed, not a single
    GPU."""

    code: str
    message: str
    hint: str
    severity: Severity = Severity.ERROR
    affects_whole_host: bool = True


def classify_failure(answer: CommandOutput) -> SmiFailure | None:
    """The failure that nvidia-smi's exit status and text mean; ``None`` if neither of them is a sign of a failure, so
    that the answer should be a table."""
    text = printable(answer.output, 2000)
    lower = text.lower()
    status = answer.exit_status
    if answer.is_cut:
        return SmiFailure(
            "gpu-unreadable",
            "nvidia-smi wrote far more than a table of GPUs",
            "run `nvidia-smi` on the host; is it a wrapper script?",
        )
    has_failed = lower.startswith(_NO_DEVICES_TEXT) or any(failure in lower for failure in _FAILURE_TEXTS)
    if status in (OK, INFOROM) and not has_failed:
        return None
    if "is not a valid field" in lower:
        return SmiFailure(
            "nvidia-smi-old", f"nvidia-smi does not know a field: {_shorten(text)}", "update the NVIDIA driver"
        )
    if "version mismatch" in lower or status == MISMATCH:
        return SmiFailure(
            "driver-mismatch",
            f"the driver's kernel module and library are of different versions: {_shorten(text)}",
            "reboot the host, or unload and load the nvidia kernel modules: the driver was updated under it",
        )
    if "failed to initialize nvml" in lower and "unknown error" in lower:
        return SmiFailure(
            "gpu-cgroup-lost",
            "the container lost its access to the GPU (NVML: Unknown Error)",
            "restart the container; `systemctl daemon-reload` on its host takes the devices away from running ones",
        )
    if status == GPU_LOST or any(lost in lower for lost in _LOST_TEXTS):
        return SmiFailure(
            "gpu-lost",
            f"a GPU has fallen off the bus: {_shorten(text)}",
            "reboot the host; if it comes back lost, check the card's power cable, seat and temperature",
            affects_whole_host=False,
        )
    if "no devices were found" in lower or status == NO_DEVICES:
        return SmiFailure(
            "gpu-missing",
            "the driver is there, but finds no GPU",
            "check `lspci | grep -i nvidia` on the host; a container needs `--gpus all`",
        )
    # The failures of NVML that have a cause of their own were tested before.
    if "couldn't communicate with the nvidia driver" in lower or "failed to initialize nvml" in lower:
        return _driver_failure(text)
    if status == NO_DRIVER or "nvidia-smi has failed" in lower:
        return _driver_failure(text)
    if _CANNOT_START.search(lower) or _WRONG_MACHINE_TEXT in lower:
        return SmiFailure(
            "driver-broken",
            f"nvidia-smi is there, but cannot start: {_shorten(text)}",
            "install the NVIDIA driver's libraries; a container gets them with `--gpus all`, if"
            " NVIDIA_DRIVER_CAPABILITIES includes `utility`",
        )
    if status in (NOT_FOUND, NOT_EXECUTABLE) or _NOT_FOUND.search(lower):
        return SmiFailure(
            "nvidia-smi-missing",
            "nvidia-smi is not installed there, or not on any usual path",
            "install the NVIDIA driver's utilities, or use a container image that has them; the server works without",
            Severity.WARNING,
        )
    ending = "was ended by a signal" if status is None else f"ended with status {status}"
    detail = f": {_shorten(text)}" if text else ""
    return SmiFailure("driver-broken", f"nvidia-smi {ending}{detail}", "run `nvidia-smi` on the host to see why")


def _driver_failure(text: str) -> SmiFailure:
    return SmiFailure(
        "driver-broken",
        f"the NVIDIA driver does not answer: {_shorten(text)}",
        "run `nvidia-smi` on the host; load the driver (`modprobe nvidia`) or install one that fits the running kernel",
    )


def _shorten(text: str) -> str:
    """The begin of nvidia-smi's text, without its advice: a finding has one remedy, its hint."""
    return printable(_ADVICE.sub("", text).strip(), 160)
