"""For all tests: in CI a part that is not there is a failure, not a skip."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.parts import REASON, in_ci


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
