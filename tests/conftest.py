"""For all tests: in CI a part that is not there is a failure, not a skip; and of tests that run side by side, some need
the machine for themselves."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.lanes import hold_lane
from tests.parts import REASON, in_ci

_LANES = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.stash[_LANES] = Path(config.workerinput["lanes"])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Of pytest-xdist, for each process that is to run tests: all are given the same folder."""
    if _LANES not in node.config.stash:
        node.config.stash[_LANES] = Path(tempfile.mkdtemp(prefix="gm-lanes-"))
    node.workerinput["lanes"] = str(node.config.stash[_LANES])


def pytest_unconfigure(config: pytest.Config) -> None:
    if _LANES in config.stash and not hasattr(config, "workerinput"):
        shutil.rmtree(config.stash[_LANES])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    """Around that of pytest-timeout: to wait for one's turn is not the test's time."""
    if _LANES not in item.config.stash:
        return (yield)
    with hold_lane(item.config.stash[_LANES], alone=item.get_closest_marker("exclusive") is not None):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """What a test printed or logged goes from its process to the one that reports, in UTF-8: some tests log what has no
    such form."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {key: _encodable(one) for key, one in value.items()}
        case list() | tuple():
            return type(value)(_encodable(one) for one in value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and in_ci() and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason.startswith(REASON):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: {reason}; in CI a part that is not there is a failure"
    return report
