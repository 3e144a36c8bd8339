"""The texts of each failure are tested in test_nvidia_smi.py; here is what holds for any of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.audit.catalog import CATALOG
from gpumesh.probes.commands.combined_commands import CommandOutput
from gpumesh.probes.smi_failures import INFOROM, NOT_EXECUTABLE, NOT_FOUND, OK, classify_failure
from tests.probes.shell_host import row

STATUSES = st.sampled_from((None, 0, 1, 2, 6, 9, 12, 14, 15, 18, 126, 127, 137, 255))
WORDS = st.sampled_from(
    (
        "NVIDIA-SMI has failed",
        "Failed to initialize NVML: ",
        "Unknown Error",
        "GPU is lost",
        "No devices were found",
        "version mismatch",
        "is not a valid field",
        "not found",
        "\x1b[31m",
        "\n",
        " ",
    )
)


@pytest.mark.parametrize("status", [OK, INFOROM])
def test_a_table_is_not_a_failure(status: int) -> None:
    assert classify_failure(CommandOutput(status, row().encode())) is None


@pytest.mark.parametrize("status", [NOT_FOUND, NOT_EXECUTABLE])
def test_a_missing_nvidia_smi_is_a_warning(status: int) -> None:
    failure = classify_failure(CommandOutput(status, b""))
    assert failure is not None
    assert (failure.code, failure.severity) == ("nvidia-smi-missing", "warning")


def test_nvidia_smi_that_a_signal_ended() -> None:
    failure = classify_failure(CommandOutput(None, b""))
    assert failure is not None
    assert (failure.code, failure.message) == ("driver-broken", "nvidia-smi was ended by a signal")


def test_only_a_lost_gpu_leaves_other_gpus_usable() -> None:
    texts = (b"GPU is lost", b"No devices were found", b"Failed to initialize NVML: Unknown Error", b"")
    failure = [classify_failure(CommandOutput(1, text)) for text in texts]
    assert [each.affects_whole_host for each in failure if each] == [False, True, True, True]


@given(STATUSES, st.binary(max_size=300) | st.lists(WORDS, max_size=8).map(lambda words: "".join(words).encode()))
def test_any_failure_has_a_code_that_is_explained(status: int | None, output: bytes) -> None:
    failure = classify_failure(CommandOutput(status, output))
    if status not in (OK, INFOROM):
        assert failure is not None, "a status that is no success is never taken for a table"
    if failure is not None:
        assert failure.code in CATALOG
        assert failure.message.isprintable()
        assert len(failure.message) < 300
        assert failure.hint


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            b"NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest"
            b" NVIDIA driver is installed and running.\n",
            "couldn't communicate with the NVIDIA driver.",
        ),
        (
            b"Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost.  Reboot the system to recover"
            b" this GPU\n",
            "GPU is lost.",
        ),
    ],
)
def test_a_finding_has_one_remedy(text: bytes, cause: str) -> None:
    failure = classify_failure(CommandOutput(9, text))
    assert failure is not None
    assert failure.message.endswith(cause), "nvidia-smi's own advice is left out"
